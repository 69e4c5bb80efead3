"""The tensors of a folder of ``safetensors`` files, read one by one."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def safetensors() -> Any:
    """The library, or an ImportError that says how to get it."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "published checkpoints need safetensors: pip install memcache_jax[pretrained]"
        ) from error
    return safetensors


class Weights:
    """The tensors of a folder: ``model.safetensors``, or the parts that its index names.

    Raises:
      ValueError: if the folder has neither, or a part is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}")
        open_file = safetensors().safe_open
        self._files = [open_file(folder / name, framework="np") for name in files]
        self._owner = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._owner)

    def __getitem__(self, name: str) -> np.ndarray:
        """One tensor, read now.

        Raises:
          ValueError: if there is none of the name.
        """
        if name not in self._owner:
            raise ValueError(f"{self.folder} has no tensor {name!r}")
        return self._owner[name].get_tensor(name)
