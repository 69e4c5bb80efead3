"""The tensors of a folder of ``safetensors`` files, read one by one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
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

    Args:
      folder: the folder.
      renamed: beginnings of names in the files, and what they are called here.

    Raises:
      ValueError: if the folder has neither, or a part is missing or damaged.
    """

    def __init__(self, folder: Path, renamed: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            owners = read_object(index).get("weight_map")
            if not isinstance(owners, dict) or not all(isinstance(x, str) for x in owners.values()):
                raise ValueError(f"{index} has no weight_map of names to files")
            files = sorted(set(owners.values()))
        else:
            owners, files = {}, ["model.safetensors"]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}{_pickles(folder)}")
        self._open: dict[str, Any] = {}
        self._owner: dict[str, tuple[str, str]] = {}
        for file in files:
            for inside in sorted(self._file(file).keys()):
                name = _renamed(inside, renamed or {})
                if name in self._owner:
                    raise ValueError(f"{folder} has both {self._owner[name][1]} and {inside}")
                self._owner[name] = file, inside
        if lost := sorted(set(owners) - {inside for _, inside in self._owner.values()}):
            raise ValueError(f"{index} names {_few(lost)}, which its files lack")
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
        file, inside = self._owner[name]
        return self._file(file).get_slice(inside)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape.

        Raises:
          ValueError: if there is none of the name.
        """
        return tuple(self._tensor(name).get_shape())

    def read(self, name: str, rows: slice | tuple[slice, ...] = slice(None)) -> np.ndarray:
        """A tensor, or some of its rows, read now.

        Raises:
          ValueError: if there is no tensor of this name, or it is not floating point.
        """
        value = self._tensor(name)[rows]
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"{name} of {self.folder} must be floating point, got {value.dtype}: quantized "
                "weights are not supported"
            )
        return value

    def close(self) -> None:
        """Closes the files until the next read; what was read of them is in memory until then."""
        self._open.clear()


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    for old, new in renamed.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _pickles(folder: Path) -> str:
    """What to do with weights of another format, if the folder has some."""
    found = sorted(path.name for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}"))
    if not found:
        return ""
    return (
        f"; {found[0]} is a pickle, which could run any code and is not read: load it with its own "
        "library and write it with safetensors"
    )
