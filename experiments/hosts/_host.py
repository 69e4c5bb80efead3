"""What the hosts have in common: changes to their source, a task, and rows of the table."""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import jax
import jax.numpy as jnp

import memcache_jax as mc

FOLDER = Path(".venv-hosts/sources")
MIXER = mc.nn.MemoryCachingMixer(mc.memories.GatedDeltaNet(), mc.GRM(), mc.Constant(16))
VOCAB, PAD, BOS, EOS = 32, 0, 1, 2


@dataclasses.dataclass
class Row:
    """A row of the table: what was run, lines changed in it, and what came of it."""

    host: str
    version: str
    lines: int
    result: str


load = importlib.import_module  # hosts are not in the environment of type checkers


def version(package: str) -> str:
    """The installed version of a package."""
    return f"{package} {importlib.metadata.version(package)}"


def fell(losses: list[float]) -> str:
    """First and last of the losses; raises AssertionError unless they fell."""
    text = f"{losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps"
    assert losses[-1] < losses[0] - 0.5, f"the loss did not fall: {text}"
    return text


def patch(source: str, changes: list[tuple[str, str]]) -> str:
    """Replaces strings of a source; each must be there once."""
    for old, new in changes:
        assert source.count(old) == 1, f"found {source.count(old)} times: {old!r}"
        source = source.replace(old, new)
    return source


def count_lines(changes: list[tuple[str, str]]) -> int:
    """How many lines of the new source are not in the old."""
    lines = (difflib.ndiff(old.splitlines(), new.splitlines()) for old, new in changes)
    return sum(line.startswith("+ ") for change in lines for line in change)


def change(module: types.ModuleType, changes: list[tuple[str, str]]) -> None:
    """Runs a module's source again, with changes."""
    path = module.__spec__.origin if module.__spec__ else None
    assert path is not None, f"{module.__name__} has no file"
    exec(compile(patch(Path(path).read_text(), changes), path, "exec"), module.__dict__)


def flax_sources() -> Path:
    """The source distribution of the installed Flax, which has the examples that wheels lack."""
    number = importlib.metadata.version("flax")
    folder = FOLDER / f"flax-{number}"
    if not folder.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        how = ["download", "--no-deps", "--no-binary", "flax", "--quiet", "--dest", str(FOLDER)]
        subprocess.run([sys.executable, "-m", "pip", *how, f"flax=={number}"], check=True)
        with tarfile.open(FOLDER / f"flax-{number}.tar.gz") as archive:
            archive.extractall(FOLDER, filter="data")
    return folder.absolute()


def mesh(
    devices: int, axes: tuple[str, ...], legacy: bool = False
) -> contextlib.AbstractContextManager:
    """A mesh of all devices along the first axis, as ``jax.make_mesh`` makes it; none for one.

    ``legacy`` is ``with mesh:`` over Auto axes, the only mesh that Tunix finds and constrains by.
    """
    if devices == 1:
        return contextlib.nullcontext()
    sizes = (devices, *[1] * (len(axes) - 1))
    if legacy:
        return jax.make_mesh(sizes, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    return jax.set_mesh(jax.make_mesh(sizes, axes))


def code_blocks(page: str) -> list[str]:
    """The Python code of a page in Markdown."""
    return re.findall(r"^```python[^\n]*\n(.*?)^```$", page, re.M | re.S)


def words(rows: int = 4, length: int = 10) -> jax.Array:
    """Random words, whose repetitions a model with a memory continues."""
    return jax.random.randint(jax.random.key(0), (rows, length), EOS + 1, VOCAB)


def prompts() -> list[str]:
    """The beginnings of two words, of different lengths."""
    first, second, *_ = words().tolist()
    return [Numbers().decode(first[:7]), Numbers().decode(second[:3])]


def repeated(length: int = 41) -> jax.Array:
    """Each row repeats a word of its own."""
    word = words()
    return jnp.tile(word, (1, -(-length // word.shape[1])))[:, :length]


class Numbers:
    """A tokenizer whose text is the numbers of the tokens, with the names of all hosts."""

    def encode(self, text: str, **_: object) -> list[int]:
        """Token ids."""
        return [int(word) for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        """Text."""
        return " ".join(map(str, tokens))

    EncodeAsIds, DecodeIds = encode, decode

    def pad_id(self) -> int:
        """Id of padding."""
        return PAD

    def bos_id(self) -> int:
        """Id of a row's begin."""
        return BOS

    def eos_id(self) -> int:
        """Id of a row's end."""
        return EOS
