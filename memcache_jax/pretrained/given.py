"""A published model's ``config.json``, read so that what is not understood is an error."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Given:
    """The values of a ``config.json``.

    Args:
      values: the values.
      where: the file, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values, self.where = values, where

    def __getitem__(self, name: str) -> Any:
        """A value that must be there.

        Raises:
          ValueError: if it is not.
        """
        if name not in self.values:
            raise ValueError(f"{self.where} has no {name!r}")
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or what the family takes for it where it is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def dtype(self) -> str:
        """The dtype of the files.

        Raises:
          ValueError: for one that is none of floating numbers.
        """
        found = self.get("dtype", self.get("torch_dtype", "float32"))
        if found not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(f"{self.where}: dtype={found!r} is not supported")
        return found

    def replaced(self, **values: Any) -> "Given":
        """The same with other values."""
        return Given({**self.values, **values}, self.where)

    def only(self, **served: Any) -> None:
        """Raises ValueError for values other than those that are served; a tuple lists several."""
        for name, wanted in served.items():
            among = wanted if isinstance(wanted, tuple) else (wanted,)
            if name in self.values and self.values[name] not in among:
                one_of = " or ".join(repr(value) for value in among)
                raise ValueError(
                    f"{self.where}: {name}={self.values[name]!r} is not supported, only {one_of}"
                )

    def number(self, name: str, default: Any = None) -> float:
        """A number; JSON's way to say infinity is read."""
        return _number(self.get(name, default))

    def numbers(self, name: str, default: Any = None) -> tuple[float, ...]:
        """Several numbers."""
        return tuple(map(_number, self.get(name, default)))

    def rope(self, part: float = 1.0) -> tuple[float, float]:
        """The base of rotary positions, and the part of the channels that have them."""
        given = self.get("rope_parameters", self.get("rope_scaling", {}))
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{self.where}: rope_type={kind!r} is not supported, only 'default'")
        base = given.get("rope_theta", self.get("rope_theta", 10_000.0))
        part = given.get("partial_rotary_factor", self.get("partial_rotary_factor", part))
        return float(base), float(part)


def _number(value: Any) -> float:
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def read_given(folder: Path) -> Given:
    """Returns a folder's ``config.json`` as it is.

    Raises:
      ValueError: if there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    if folder.name == "config.json" and folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder that it is in")
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: give a folder as its library saves models")
    return Given(read_object(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object that a file holds.

    Raises:
      ValueError: if it holds none.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got {type(values).__name__}")
    return values
