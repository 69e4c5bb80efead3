"""The tensors of a folder of ``safetensors`` files, read one by one."""

from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # whose names of dtypes NumPy then knows
import numpy as np

from memcache_jax.pretrained.given import read_object


def safetensors() -> Any:
    """The library, or an ImportError that says how to get it."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "public checkpoints need safetensors and ml_dtypes: pip install '.[pretrained]' in a "
            "checkout of memcache_jax"
        ) from error
    return safetensors


class Weights:
    """The tensors of a folder: ``model.safetensors``, or the parts that its index names.

    Raises:
      ValueError: if the folder has neither, or a part is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            owners = read_object(index).get("weight_map")
            if not isinstance(owners, dict) or not all(isinstance(x, str) for x in owners.values()):
                raise ValueError(f"{index} has no weight_map of names to files")
            files = sorted(set(owners.values()))
        else:
            files = ["model.safetensors"]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}")
        self._open: dict[str, Any] = {}
        names = {file: self._file(file).keys() for file in files}
        self._owner = {name: file for file in files for name in names[file]}
        self.close()

    def _file(self, file: str) -> Any:
        if file not in self._open:
            path, library = self.folder / file, safetensors()
            try:
                self._open[file] = library.safe_open(path, framework="np")
            except library.SafetensorError as error:
                raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
        return self._open[file]

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._owner)

    def _tensor(self, name: str) -> Any:
        if name not in self._owner:
            raise ValueError(f"{self.folder} has no tensor {name!r}")
        return self._file(self._owner[name]).get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape.

        Raises:
          ValueError: if there is none of the name.
        """
        return tuple(self._tensor(name).get_shape())

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or some of its rows, read now.

        Raises:
          ValueError: if there is none of the name.
        """
        return self._tensor(name)[rows]

    def close(self) -> None:
        """Closes the files until the next read; what was read of them is in memory until then."""
        self._open.clear()
