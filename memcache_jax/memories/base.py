"""The protocol that a write rule fulfills to get every aggregation and segmentation."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

import jax.numpy as jnp

from memcache_jax._typing import Apply, Array, Bool, Controls, Float, Int, Matrices, State
from memcache_jax.memories.control import Control

Form: TypeAlias = Literal["scan", "affine", "descent"]
"""How the chunks of a memory follow from each other, and so how fast they can be written.

``"scan"``: a chunk waits for the one before; any rule. ``"affine"``: a chunk is an affine map of
the state's one matrix, and a read is one product with it; ``AffineMemory``. ``"descent"``: a chunk
is a step of gradient descent on a small network; ``DeepMemory``.
"""


_STATED = (
    *("form", "merges", "erases", "reads_query", "accumulates", "zeros_add_nothing", "on_chip"),
    "takes_padding",
)


class Run(NamedTuple):
    """A run of tokens as a map of the state before it.

    For an affine memory the map of its matrix is M -> A M + B.

    Attributes:
      state: the state after the run where it begins anew; its matrix is B.
      transition: what else there is to know, such as A; None if not needed.
    """

    state: State
    transition: Any


class Memory(abc.ABC):
    """A recurrent memory: how it is written and how it is read, for one head of one sequence.

    A rule implements a few small methods on unbatched arrays; callers map them over batch, heads
    and segments. ``step`` is the equation, ``write`` computes it for a chunk of tokens.

    A memory's parameters are a tuple of matrices, and its forward pass calls an abstract
    ``apply(layer, x)``. So one ``forward`` serves a frozen state (``x W``), the live state after
    every token of a chunk (``apply``), and a mixture of many states.

    A rule states what it is in class attributes, ``form`` to ``on_chip``. A class that
    derives from a finished rule is a ``"scan"`` with the defaults below until it states them again:
    whatever it overrides then runs on every path.
    """

    form: ClassVar[Form] = "scan"
    """How its chunks follow from each other."""

    merges: ClassVar[bool] = False
    """Whether a run of tokens is a map of the state before it: ``compose`` joins two into one."""

    erases: ClassVar[bool] = True
    """Whether a token may erase part of what an affine memory holds, rather than only decay it."""

    reads_query: ClassVar[bool] = True
    """Whether a read depends on the query; if not, it is the state's one matrix, a row."""

    accumulates: ClassVar[bool] = True
    """Whether a state depends on tokens before its last."""

    zeros_add_nothing: ClassVar[bool] = False
    """Whether padding with zeros does not change the gradient of a deep memory's loss."""

    on_chip: ClassVar[bool] = False
    """Whether kernels for TPUs may trace ``affine`` of an affine memory, so that the maps of chunks
    never leave the chip. If not, all maps are made first, and pass through HBM.
    """

    takes_padding: ClassVar[bool] = False
    """Whether zeros, in controls too, may fill a chunk of a rule that is exact for any chunk; see
    ``without_padding``. If not, streams take tokens that do not fill a chunk one by one.
    """

    depth: int = 1
    """Layers that a read passes through one after the other."""

    largest_chunk: ClassVar[int] = 64
    """Tokens that a rule which is exact for any chunk is best written in at once."""

    fixed: ClassVar[tuple[str, ...]] = ()
    """Methods that a rule must not override unless it states ``form = "scan"``."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        bases = [base for base in cls.__bases__ if issubclass(base, Memory)]
        if not all(base.__abstractmethods__ for base in bases):  # derives from a finished rule
            for name in _STATED:
                if name not in vars(cls):
                    setattr(cls, name, getattr(Memory, name))
        if "write" in vars(cls) and "write_map" not in vars(cls):
            cls.write_map = Memory.write_map  # which calls it
        if cls.form not in get_args(Form):
            raise TypeError(
                f"{cls.__name__}: form must be one of {get_args(Form)}, got {cls.form!r}"
            )
        owner = owner_of(cls, "fixed")
        if cls.form not in ("scan", owner.form):
            raise TypeError(
                f"{cls.__name__}: form={cls.form!r} needs a base of that form, AffineMemory for "
                f"'affine' and DeepMemory for 'descent', got {owner.__name__}"
            )
        kept = owner.__mro__
        own = [name for name in cls.fixed if owner_of(cls, name) not in kept]
        if own and cls.form != "scan":
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(own)}, which the fast paths of form="
                f"{cls.form!r} do not call: state form = 'scan' in it"
            )

    def bounded(self) -> "Memory":
        """The rule as layers use it: with a bound on its state, if it needs one."""
        return self

    @property
    def gradient_chunk(self) -> int | None:
        """Tokens that share one inner gradient; None for rules that are exact for any chunk."""
        return None

    @property
    def controls(self) -> Mapping[str, Control]:
        """The rule's coefficients, by name."""
        return {}

    def coupled(self, controls: Controls) -> Controls:
        """The controls as a layer uses them, for rules that scale one by another."""
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

    def closed(
        self, state: State, anchor: State, controls: Controls, counts: Bool[Array, "m"]
    ) -> State:
        """The state after a full chunk: by default the one after its last token.

        ``step`` and ``closed`` define the rule; ``write`` of a full chunk returns this state.

        Args:
          state: the state after the chunk's last token.
          anchor: the state at which the chunk began.
          controls: the coefficients of the last ``gradient_chunk`` tokens.
          counts: which of these tokens belong to the chunk; fewer if a document began in it.
        """
        del anchor, controls, counts
        return state

    def without_padding(
        self,
        state: State,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        count: Int[Array, ""],
    ) -> State:
        """The state after the first ``count`` tokens of a chunk whose others were zeros.

        This default serves memories that a token of zeros, in controls too, leaves as they are.

        Args:
          state: the state after the whole chunk.
          key: as for ``write``, and so are the values.
          value: see key.
          count: how many tokens come before the zeros, 1 or more.
        """
        del key, value, count
        return state

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

        This default serves memories that start at zero and have a control with ``forget``, or that
        override ``forgetting``.

        Args:
          state: the state before the chunk, of the document that continues into it.
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
        """The controls with which the marked tokens forget everything written before them.

        Raises:
          ValueError: for a memory without a control that makes it forget.
        """
        values = {n: c.forget for n, c in self.controls.items() if c.forget is not None}
        if not values:
            raise ValueError(
                f"{type(self).__name__} takes no document_ids: give one of its controls a value "
                "at which it forgets, Control(forget=...), or override forgetting"
            )

        def at_begins(x: Array, value: float) -> Array:
            return jnp.where(begins.reshape(-1, *[1] * (x.ndim - 1)), value, x)

        forgotten = {name: at_begins(controls[name], value) for name, value in values.items()}
        return {**controls, **forgotten}

    @abc.abstractmethod
    def apply(self, chunk: Any, layer: int, x: Float[Array, "m in"]) -> Float[Array, "m out"]:
        """Passes row t of ``x`` through a layer of the live memory as it is after token t."""

    def keep_layer(self, chunk: Any, layer: int) -> Any:
        """The part of a chunk that ``apply`` needs for one layer."""
        del layer
        return chunk

    @abc.abstractmethod
    def matrices(self, state: State) -> Matrices:
        """The parameters that a read needs and a cache keeps, with the state's batch axes."""

    @abc.abstractmethod
    def forward(
        self, apply: Apply, query: Float[Array, "*rows k"], gate: Float[Array, "rows"] | None = None
    ) -> Float[Array, "*rows v"]:
        """The memory as a function of the query, over an abstract ``apply``, times a gate.

        Apply the first layer to ``features(query)``. Apply the gate to the input of the last layer
        and to anything that is added to its output: the gate's gradient is then a product of rows,
        and needs no second read.
        """

    def features(self, query: Float[Array, "*rows k"]) -> Float[Array, "*rows in"]:
        """What the first layer reads: the query itself."""
        return query

    def read(
        self,
        matrices: Matrices,
        query: Float[Array, "rows k"],
        gate: Float[Array, "rows"] | None = None,
    ) -> Float[Array, "rows v"]:
        """Reads a frozen state, times a gate if there is one."""
        return self.forward(lambda layer, x: jnp.matmul(x, matrices[layer]), query, gate)

    def identity(self, key_dim: int, dtype: Any) -> Any:
        """The transition of no tokens, of a memory that ``merges``."""
        raise NotImplementedError(f"runs of {type(self).__name__} do not compose")

    def extended(
        self,
        transition: Any,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        controls: Controls,
    ) -> Any:
        """The transition of a run and of a chunk after it; arguments as for ``write``."""
        raise NotImplementedError(f"runs of {type(self).__name__} do not compose")

    def write_map(
        self, run: Run, key: Float[Array, "m k"], value: Float[Array, "m v"], controls: Controls
    ) -> tuple[Run, Any]:
        """``write`` of a chunk after a run, with the transition: the longer run, and the view."""
        state, chunk = self.write(run.state, run.state, key, value, controls)
        return Run(state, self.extended(run.transition, key, value, controls)), chunk

    def compose(self, first: Run, then: Run) -> Run:
        """Two runs that follow each other as one. The operation is associative.

        With another state in place of ``first.state``, and perhaps None for its transition, the
        result has the state that ``then`` leaves of it.
        """
        raise NotImplementedError(f"runs of {type(self).__name__} do not compose")

    def read_online(self, chunk: Any, query: Float[Array, "m k"]) -> Float[Array, "m v"]:
        """Reads the live memory with each token's query, right after that token's write."""
        return self.forward(lambda layer, x: self.apply(chunk, layer, x), query)


def owner_of(cls: type, name: str) -> type:
    """The class that an attribute comes from."""
    return next(base for base in cls.__mro__ if name in vars(base))


def first_of_documents(begun: Int[Array, "m"]) -> Bool[Array, "m"]:
    """Whether each token begins a document, from the number that have begun in its chunk."""
    return begun > jnp.pad(begun[:-1], (1, 0))
