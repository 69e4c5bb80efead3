"""Files of text, and records of one letter each."""

from memcache_jax.training.files import find_files
from memcache_jax.training.records import Records


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def letters(tmp_path, lengths):
    """Records of one letter each, repeated `lengths` times: a for the first, b for the second."""
    texts = {f"{i:02}.txt": chr(ord("a") + i) * n for i, n in enumerate(lengths)}
    return Records(find_files(str(write(tmp_path / "letters", texts))))
