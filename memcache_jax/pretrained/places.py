"""Where a model keeps the parameters of its layers."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from flax import nnx

from memcache_jax.nn import LanguageModel
from memcache_jax.pretrained.tensors import Part, Tensor


@dataclasses.dataclass(frozen=True)
class Place:
    """A part's place: a parameter of the model, and which of those that it stacks."""

    path: tuple[Any, ...]
    index: tuple[int, ...]


class Places:
    """Finds the places of parts in a model.

    Attributes:
      params: the model's parameters, by path.
    """

    def __init__(self, model: LanguageModel) -> None:
        stacks = model.config.stacks
        self._layers: list[tuple[tuple[Any, ...], int]] = []
        for number, (blocks, repeats) in enumerate(stacks):
            stack = ("layers",) if len(stacks) == 1 else ("layers", number)
            for repeat in range(repeats):
                own = ((*stack, "blocks", block) for block in range(len(blocks)))
                self._layers += [(path, repeat) for path in own]
        self.params = {
            tuple(path): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
        }

    def of(self, tensor: Tensor, part: Part) -> Place:
        """The place of a tensor's part."""
        names = tuple(int(name) if name.isdigit() else name for name in part.path.split("/"))
        if tensor.layer is None:
            return Place(names, ())
        path, repeat = self._layers[tensor.layer]
        index = (repeat,) if part.index is None else (repeat, part.index)
        return Place((*path, *names), index)

    def shape(self, place: Place) -> tuple[int, ...]:
        """The shape of what is there."""
        return self.params[place.path].shape[len(place.index) :]

    def uses(self, tensors: Iterable[Tensor]) -> dict[tuple, list[tuple[Tensor, int, Place]]]:
        """For each parameter the tensors that it is in, as which part, and where."""
        found: dict[tuple, list[tuple[Tensor, int, Place]]] = {path: [] for path in self.params}
        for tensor in tensors:
            for number, part in enumerate(tensor.parts):
                place = self.of(tensor, part)
                found[place.path].append((tensor, number, place))
        return found
