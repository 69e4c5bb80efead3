"""How the tensors of a published file are made of a model's parameters, and cut into them."""

import dataclasses
from typing import Any, Literal, TypeAlias

import numpy as np

Form: TypeAlias = Literal["same", "matrix", "conv"]
"""How a file has a parameter: as it is; transposed in the last two axes; (channels, 1, width)."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One parameter's place in a tensor.

    Attributes:
      path: the parameter, such as ``"mixer/query/linear/kernel"`` of a layer.
      form: how the file has it.
      index: which of the matrices that the parameter stacks along its first axis; None for all.
    """

    path: str
    form: Form = "same"
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Tensors of a file that are parameters joined along the first axis.

    Attributes:
      names: of the tensors, which join to one. When written, it is cut into equal pieces; where
        the rows do not divide evenly, the first pieces get one more.
      parts: the parameters that it is made of, in order.
      layer: the layer that they belong to; None for the model itself.
      groups: how often the parts take turns: each group of rows has a piece of every part.
      axis: the axis of rows, along which parts are joined.
      shape: the tensor's shape, with one -1, where it is not that of its parts.
      others: other names that files have for the tensors, which are read and not written.
      others_row: the row of the one other that the tensor is; None for all of it.
      row: the same of ``names``.
    """

    names: tuple[str, ...]
    parts: tuple[Part, ...]
    layer: int | None = None
    groups: int = 1
    axis: int = 0
    shape: tuple[int, ...] | None = None
    others: tuple[str, ...] = ()
    others_row: int | None = None
    row: int | None = None

    def named_in(self, names: set[str]) -> "Tensor":
        """The tensor by the names that a file has for it."""
        if self.others and set(self.others) <= names:
            return dataclasses.replace(self, names=self.others, row=self.others_row)
        return self

    def shape_of(self, sizes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the joined tensor, from the shapes of its parts."""
        first, *others = [_file_shape(part, x) for part, x in zip(self.parts, sizes, strict=True)]
        rows = first[self.axis : self.axis + 1] if first else ()
        rows = tuple(n + sum(shape[self.axis] for shape in others) for n in rows)
        return (*first[: self.axis], *rows, *first[self.axis + 1 :])

    def cut(self, joined: np.ndarray, sizes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """The parts of the joined tensor, of these shapes, in their parameters' forms."""
        pieces = [joined]
        if len(self.parts) > 1:
            rows = [_rows(part, size) for part, size in zip(self.parts, sizes, strict=True)]
            ends = np.cumsum([n // self.groups for n in rows])[:-1]
            turns = self._in_turns(joined)
            pieces = [self._whole(x) for x in np.split(turns, ends, axis=self.axis + 1)]
        pairs = zip(self.parts, pieces, sizes, strict=True)
        return [_from_file(part, piece).reshape(size) for part, piece, size in pairs]

    def rows_of(
        self, number: int, sizes: list[tuple[int, ...]]
    ) -> slice | tuple[slice, ...] | None:
        """The rows that are this part alone; None if it is spread over the tensor, or several."""
        if len(self.names) > 1 or self.groups > 1 or self.axis:
            return None
        rows = [_rows(part, size) for part, size in zip(self.parts, sizes, strict=True)]
        begin = sum(rows[:number])
        own = slice(begin, begin + rows[number]) if len(rows) > 1 else slice(None)
        return own if self.row is None else (slice(self.row, self.row + 1), own)

    def part_of(self, number: int, rows: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        """The part whose rows these are, in its parameter's form."""
        own = rows if self.row is None else rows[0]
        return _from_file(self.parts[number], own).reshape(size)

    def join(self, values: list[np.ndarray]) -> dict[str, np.ndarray]:
        """The file's tensors, by name, of the parts' parameters."""
        pieces = [_to_file(part, x) for part, x in zip(self.parts, values, strict=True)]
        joined = pieces[0]
        if len(pieces) > 1:
            turns = [self._in_turns(piece) for piece in pieces]
            joined = self._whole(np.concatenate(turns, axis=self.axis + 1))
        if self.shape is not None:
            joined = joined.reshape(self.shape)
        if len(self.names) == 1:
            return {self.names[0]: joined}
        return dict(zip(self.names, np.array_split(joined, len(self.names)), strict=True))

    def _in_turns(self, x: np.ndarray) -> np.ndarray:
        """With an axis of the groups before that of the rows."""
        shape = x.shape[: self.axis], x.shape[self.axis + 1 :]
        return x.reshape(*shape[0], self.groups, -1, *shape[1])

    def _whole(self, x: np.ndarray) -> np.ndarray:
        shape = x.shape[: self.axis], x.shape[self.axis + 2 :]
        return x.reshape(*shape[0], -1, *shape[1])


def _rows(part: Part, shape: tuple[int, ...]) -> int:
    """Rows of a parameter as the file has it."""
    return shape[-1] if part.form in ("matrix", "conv") else shape[0]


def _file_shape(part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
    if part.form == "same":
        return shape
    return (*shape[:-2], shape[-1], shape[-2]) if part.form == "matrix" else (shape[1], 1, shape[0])


def _from_file(part: Part, x: np.ndarray) -> np.ndarray:
    if part.form == "matrix":
        return np.swapaxes(x, -1, -2)
    return x[:, 0].T if part.form == "conv" else x


def _to_file(part: Part, x: np.ndarray) -> np.ndarray:
    if part.form == "matrix":
        return np.swapaxes(x, -1, -2)
    return x.T[:, None] if part.form == "conv" else x


@dataclasses.dataclass(frozen=True)
class Names:
    """Makes the tensors of one layer, whose names begin alike in the file.

    Attributes:
      prefix: what they begin with.
      layer: the layer; None for the model itself.
    """

    prefix: str
    layer: int | None = None

    def tensor(self, name: str, *parts: Part, **options: Any) -> Tensor:
        """A tensor of parts."""
        return Tensor((self.prefix + name,), parts, self.layer, **options)

    def same(self, name: str, path: str, **options: Any) -> Tensor:
        """A tensor that is a parameter as it is."""
        return self.tensor(name, Part(path), **options)

    def norm(self, name: str, path: str, bias: bool = False) -> list[Tensor]:
        """The scale of a norm, and its bias."""
        out = [self.same(f"{name}.weight", f"{path}/scale")]
        return [*out, self.same(f"{name}.bias", f"{path}/bias")] if bias else out

    def linear(self, name: str, *paths: str, bias: bool = False, groups: int = 1) -> list[Tensor]:
        """The weight of a projection, or of several in one, and its bias."""
        kernels = (Part(f"{path}/kernel", "matrix") for path in paths)
        out = [self.tensor(f"{name}.weight", *kernels, groups=groups)]
        if bias:
            biases = (Part(f"{path}/bias") for path in paths)
            out.append(self.tensor(f"{name}.bias", *biases, groups=groups))
        return out

    def conv(self, name: str, *paths: str, bias: bool = False) -> list[Tensor]:
        """The taps of a causal convolution, or of several in one, and its bias."""
        out = [self.tensor(f"{name}.weight", *(Part(f"{path}/kernel", "conv") for path in paths))]
        if bias:
            out.append(self.tensor(f"{name}.bias", *(Part(f"{path}/bias") for path in paths)))
        return out
