"""The protocol that a write rule fulfils to get every aggregation and segmentation."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from memcache_jax._typing import Apply, Array, Bool, Controls, Float, Int, Matrices, State
from memcache_jax.kernels.affine_update import AffineChunk
from memcache_jax.kernels.pieces import gated as gated
from memcache_jax.memories._pieces import Fits, Piece


@dataclasses.dataclass(frozen=True)
class Control:
    """One coefficient of a write rule: its axes, and how a layer makes it from its input.

    A layer computes ``scale * activation(x W + bias)``.

    Attributes:
      axes: its shape in axis letters: ``"b t h"`` for one number per token and head,
        ``"b t h k"`` for one per key channel, ``"h"`` for a constant of each head.
      activation: from logits to the coefficient; decays travel as logs (<= 0).
      bias: what the logits are before training.
      scale: a constant factor.
      optional: whether a caller may leave it out, which is to say zero. Layers do.
      per_head: for the axes ``"h"``, the constants that a layer takes, from the number of heads.
      forget: its value at a token that begins a document, where that makes the memory forget what
        it holds; -inf for the log of a decay.
    """

    axes: str = "b t h"
    activation: Callable[[Array], Array] = jax.nn.sigmoid
    bias: float = 0.0
    scale: float = 1.0
    optional: bool = False
    per_head: Callable[[int], Array] | None = None
    forget: float | None = None


NEAR_ONE = Control(activation=jax.nn.log_sigmoid, bias=5.0, forget=-jnp.inf)
"""The log of a decay per token and head that starts near one."""


class Memory(abc.ABC):
    """A recurrent memory: how it is written and how it is read, for one head of one sequence.

    A rule implements a few small methods on unbatched arrays; the callers map them over batch,
    heads and segments. ``write`` is the fast path, ``step`` the equation it must equal.

    A memory's parameters are a tuple of matrices, and its forward pass is code over an abstract
    ``apply(layer, x)``. So one ``forward`` serves a frozen state (``x W``), the live state at
    every token of a chunk (``apply``), and a mixture of many states.
    """

    depth: int = 1
    """Layers that a read passes through one after the other."""

    largest_chunk: ClassVar[int] = 64
    """Tokens that a rule which is exact for any chunk is best written in at once."""

    reads_query: ClassVar[bool] = True
    """Whether a read depends on the query; else it is the state's one matrix, a row."""

    @property
    def gradient_chunk(self) -> int | None:
        """Tokens that share one inner gradient; None for rules that are exact for any chunk."""
        return None

    @property
    def controls(self) -> Mapping[str, Control]:
        """The rule's coefficients, by name."""
        return {}

    def coupled(self, controls: Controls) -> Controls:
        """The controls that a layer uses, where one is to be scaled by another."""
        return controls

    def weight_shapes(self, key_dim: int, value_dim: int) -> dict[str, tuple[int, int]]:
        """Shapes (out, in) of the learned initial weights, by name; empty if it starts at zero."""
        del key_dim, value_dim
        return {}

    @abc.abstractmethod
    def init(self, weights: Mapping[str, Array], key_dim: int, value_dim: int, dtype: Any) -> State:
        """Returns the state before the first token."""

    @abc.abstractmethod
    def step(
        self,
        state: State,
        anchor: State,
        key: Float[Array, "k"],
        value: Float[Array, "v"],
        controls: Controls,
    ) -> State:
        """Writes one token.

        Args:
          state: the state after the previous token.
          anchor: the state at which the current chunk began; rules that are exact for any chunk
            ignore it.
          key: the token's key.
          value: the token's value.
          controls: the token's coefficients.

        Returns:
          The state after the token.
        """

    @abc.abstractmethod
    def write(
        self,
        state: State,
        anchor: State,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        controls: Controls,
    ) -> tuple[State, Any]:
        """Writes a chunk of tokens with matrix products.

        Returns:
          The state after the chunk, and a view of the chunk through which ``apply`` reads the
          live memory at each of its tokens.
        """

    @property
    def is_affine(self) -> bool:
        """Whether ``affine`` works: no subclass of the one that has it does otherwise."""
        owner = next(kind for kind in type(self).__mro__ if "affine" in vars(kind))
        instead_of = "init", "write", "write_documents", "apply", "forward", "read_online"
        return owner is not Memory and not self.overridden(owner, *instead_of)

    def affine(
        self,
        before: State,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        query: Float[Array, "m k"],
        controls: Controls,
    ) -> AffineChunk:
        """A chunk's write and online read as a map of the state's matrix.

        For memories whose state is one matrix, zero at first, beside what ``carried`` knows, and
        that forget by their controls. Kernels take it instead of ``write`` and ``read_online``; of
        a memory that also has ``merge``, so does XLA where segments begin anew.

        Args:
          before: the state before the chunk, with a zero matrix.
          key: as for ``write``.
          value: as for ``write``.
          query: what reads, each right after its token's write.
          controls: as for ``write``.
        """
        raise NotImplementedError(f"chunks of {type(self).__name__} are no affine maps of a matrix")

    def carried(self, key: Float[Array, "m k"], value: Float[Array, "m v"]) -> State:
        """The state after a chunk of a memory that has ``affine``, with a zero matrix."""
        return self.init({}, key.shape[-1], value.shape[-1], key.dtype)

    def write_documents(
        self,
        state: State,
        initial: State,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        controls: Controls,
        begun: Int[Array, "m"],
    ) -> tuple[State, Any]:
        """Writes a chunk in which documents begin, each from the initial state.

        For memories that start at zero and whose controls say how to ``forget``, or that override
        ``forgetting``; others override this.

        Args:
          state: the state before the chunk, of the document that goes on.
          initial: the state before a document's first token.
          key: as for ``write``.
          value: as for ``write``.
          controls: as for ``write``.
          begun: documents that have begun in the chunk, up to and with each token.

        Returns:
          As ``write``.

        Raises:
          ValueError: for a memory that starts at learned weights and does not override this.
        """
        del initial
        if self.weight_shapes(key.shape[-1], value.shape[-1]):
            raise ValueError(
                f"{type(self).__name__} starts at learned weights: for document_ids it must "
                "override write_documents"
            )
        controls = self.forgetting(controls, first_of_documents(begun))
        return self.write(state, state, key, value, controls)

    def forgetting(self, controls: Controls, begins: Bool[Array, "m"]) -> Controls:
        """The controls with which the marked tokens forget all that was written before them.

        Raises:
          ValueError: for a memory whose controls cannot make it forget.
        """
        values = {n: c.forget for n, c in self.controls.items() if c.forget is not None}
        if not values:
            raise ValueError(
                f"{type(self).__name__} takes no document_ids: give one of its controls a value "
                "at which it forgets, Control(forget=...), or override write_documents"
            )

        def at_begins(x: Array, value: float) -> Array:
            return jnp.where(begins.reshape(-1, *[1] * (x.ndim - 1)), value, x)

        forgotten = {name: at_begins(controls[name], value) for name, value in values.items()}
        return {**controls, **forgotten}

    @abc.abstractmethod
    def apply(self, chunk: Any, layer: int, x: Float[Array, "m in"]) -> Float[Array, "m out"]:
        """Passes row t of ``x`` through a layer of the live memory as it is after token t."""

    def keep_layer(self, chunk: Any, layer: int) -> Any:
        """What ``apply`` needs of a chunk for one layer, with nothing that only others need."""
        del layer
        return chunk

    @abc.abstractmethod
    def matrices(self, state: State) -> Matrices:
        """The parameters that a read needs, which is what a cache keeps, batched as the state."""

    @abc.abstractmethod
    def forward(
        self, apply: Apply, query: Float[Array, "*rows k"], gate: Float[Array, "rows"] | None = None
    ) -> Float[Array, "*rows v"]:
        """The memory as a function of the query, over an abstract ``apply``, times a gate.

        The first layer is applied to the query itself. A gate goes on the input of the last layer,
        and on whatever else is added to its output:
        the gate's gradient is then a product of rows, and needs no output read anew.
        """

    def read(
        self,
        matrices: Matrices,
        query: Float[Array, "rows k"],
        gate: Float[Array, "rows"] | None = None,
    ) -> Float[Array, "rows v"]:
        """Reads a frozen state, times a gate if there is one."""
        return self.forward(lambda layer, x: jnp.matmul(x, matrices[layer]), query, gate)

    def pieces(self, matrices: Matrices, query: Float[Array, "... k"], fits: Fits) -> list[Piece]:
        """Reads of smaller states that add up to ``read``, as few as fit.

        A class that overrides this without a subclass's ``read`` or ``forward`` in mind asks
        ``reads_as`` first.

        Args:
          matrices: the matrices of states, (..., in, out) each.
          query: what reads them.
          fits: whether matrices are small enough.

        Returns:
          The pieces; the whole, if the read is no such sum.
        """
        del fits
        return [Piece(self.read, matrices, query)]

    def reads_as(self, kind: type["Memory"]) -> bool:
        """Whether nothing between this class and ``kind`` overrides how a state is read."""
        return not self.overridden(kind, "read", "forward")

    def overridden(self, kind: type["Memory"], *names: str) -> list[str]:
        """Of methods of these names, those that a class between this one and ``kind`` overrides."""
        own = type(self)
        return [name for name in names if getattr(own, name) is not getattr(kind, name, None)]

    @property
    def mergeable(self) -> bool:
        """Whether ``merge`` works."""
        return type(self).merge is not Memory.merge

    def merge(self, left: State, right: State, controls: Controls) -> State:
        """The state of two runs of tokens, each written from the initial state, as one run.

        Args:
          left: the state after the earlier run.
          right: the state after the later one.
          controls: the later run's controls.
        """
        raise NotImplementedError(f"states of {type(self).__name__} cannot be merged")

    def read_online(self, chunk: Any, query: Float[Array, "m k"]) -> Float[Array, "m v"]:
        """Reads the live memory with each token's query, right after that token's write."""
        return self.forward(lambda layer, x: self.apply(chunk, layer, x), query)


def first_of_documents(begun: Int[Array, "m"]) -> Bool[Array, "m"]:
    """Whether a token begins a document, from how many have begun in its chunk."""
    return begun > jnp.pad(begun[:-1], (1, 0))
