"""A layer of memory caching that is composed of parts."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memcache_jax import _checks
from memcache_jax._typing import Array, Exchange, Float, Implementation, Int, Start
from memcache_jax.aggregation import Aggregation, Residual
from memcache_jax.memories import Memory
from memcache_jax.nn.borders import learn_borders
from memcache_jax.nn.layer_cache import LayerCache
from memcache_jax.nn.memory_layer import MemoryLayer
from memcache_jax.nn.recurrent.checks import check_parts
from memcache_jax.nn.recurrent.coefficients import Coefficient
from memcache_jax.nn.recurrent.connector import connect, make_connector, match
from memcache_jax.nn.recurrent.output import Output
from memcache_jax.nn.recurrent.path import Path, Rows
from memcache_jax.nn.recurrent.turning import turned
from memcache_jax.nn.token_shift import LayerInput, next_previous, previous_tokens
from memcache_jax.segmentation import Constant, Segmentation
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.layout import like
from memcache_jax.sharding.names import partitioned

# Longer than any stream, so that there is one segment: the rule without caches.
ENDLESS = Constant(2**30)


@dataclasses.dataclass(frozen=True)
class RecurrentMixer:
    """Blocks mix tokens with ``Recurrent``, which is composed of these parts.

    Attributes:
      memory: the write rule.
      query: how queries are made.
      key: how keys are made; heads and dim are those of the queries.
      value: how values are made; its heads are the layer's, which those of queries and keys divide.
        If these are fewer, a memory's chunks still have a row of theirs for each head: compiled for
        CPUs, rows are repeated where chunks are laid out, in one pass, and no repeated copy comes
        before that.
      coefficients: how the rule's coefficients are made.
      output: what becomes of the memories' reads.
      skip: whether D_h times the value is added to a read, D one learned number per head.
      biases: whether one learned vector per head, of ones at first, is added to queries and another
        to keys before they turn by the data, as to C and B of Mamba-3 (arXiv:2603.15569).
      bonus: whether sum_k(query key u_h) times the value is added after the output's norm, u one
        learned number per key channel, as in RWKV-7 (arXiv:2503.14456).
      shares_values: whether later layers of the model get this one's values: see ``Path.first``.
      matched: whether keys and connectors match queries from the start on, as in
        ``mc.nn.MemoryCaching``: W_k and W_u start as copies of W_q, and content gates compare
        u = temperature * W_u x / |W_u x|, with 10 as the first temperature of a head. Else
        u = W_u x + temperature * q / |q|, both zero, so that gates are uniform before training.
      aggregation: how reads of live and cached memories become one output.
      segmentation: where states are cached; by default nowhere.
      start: what a segment's memory begins with.
      implementation: as in ``memory_caching``.
      exchange: as in ``MemoryCaching``.

    Raises:
      ValueError: for parts that do not fit each other or the rule.
    """

    memory: Memory
    query: Path
    key: Path
    value: Path
    coefficients: tuple[Coefficient, ...] = ()
    output: Output = Output()
    skip: bool = False
    biases: bool = False
    bonus: bool = False
    shares_values: bool = False
    matched: bool = False
    aggregation: Aggregation = Residual()
    segmentation: Segmentation = ENDLESS
    start: Start = "independent"
    implementation: Implementation | None = None
    exchange: Exchange = "gather"

    def __post_init__(self) -> None:
        check_parts(self)

    @property
    def shifts(self) -> bool:
        """Whether a part mixes in the token before."""
        paths = self.query, self.key, self.value
        low = [getattr(part, "low", None) for part in self.coefficients]
        return any(part is not None and part.shift for part in (*paths, *low, self.output.gate_low))

    @property
    def turns(self) -> bool:
        """Whether queries and keys turn by angles that a part makes."""
        return any(getattr(part, "turns", False) for part in self.coefficients)

    def build(
        self,
        in_features: int,
        num_heads: int | None = None,
        *,
        head_dim: Any = None,
        **options: Any,
    ) -> "Recurrent":
        """Returns the layer, whose heads are those of the parts."""
        del num_heads, head_dim
        return Recurrent(self, in_features, **options)


class Kept(NamedTuple):
    """What a layer's output needs beside what the memories return, and what later layers may."""

    inputs: LayerInput
    tokens: dict[str, Any]
    values: Float[Array, "b t hv"]


class Recurrent(MemoryLayer):
    """A recurrent memory with cached segment states, composed of a ``RecurrentMixer``'s parts.

    Args:
      mixer: the parts.
      in_features: model dimension d of the input and the output.
      dtype: dtype of the arithmetic; by default the wider of the input's and ``param_dtype``.
      param_dtype: dtype of the parameters; learned constants of decays are always float32.
      rngs: random keys.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> from memcache_jax.nn import recurrent
      >>> keys = recurrent.Path(heads=2, dim=8, conv_width=4, norm="l2")
      >>> mixer = recurrent.RecurrentMixer(
      ...     mc.memories.GatedDeltaNet(), keys, keys, recurrent.Path(4, 16, conv_width=4),
      ...     (recurrent.TimeStepDecay(), recurrent.Rate()), segmentation=mc.Constant(16))
      >>> mixer.build(32, rngs=nnx.Rngs(0))(jnp.ones((1, 40, 32))).shape
      (1, 40, 32)
    """

    def __init__(
        self,
        mixer: RecurrentMixer,
        in_features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        _checks.check_instance("mixer", mixer, RecurrentMixer, "a RecurrentMixer")
        _checks.check_dtype("dtype", dtype, optional=True)
        _checks.check_dtype("param_dtype", param_dtype)
        self.shifts, self.shares_values = mixer.shifts, mixer.shares_values
        self.turns = mixer.turns
        self.in_features = _checks.check_integer("in_features", in_features)
        self.num_heads = heads = mixer.value.heads
        self.head_dim, self.value_dim = mixer.key.dim, mixer.value.dim
        self.memory, self.aggregation = mixer.memory, mixer.aggregation
        self.segmentation, self.start = mixer.segmentation, mixer.start
        self.implementation, self.exchange = mixer.implementation, mixer.exchange
        self.dtype, self.param_dtype = dtype, param_dtype
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.query, self.key, self.value = (
            path.build(in_features, **options) for path in (mixer.query, mixer.key, mixer.value)
        )
        self.matched = mixer.matched
        if mixer.matched:
            match(self.key, self.query)
        self.coefficients = nnx.List(
            [
                part.build(in_features, heads, self.head_dim, **options)
                for part in mixer.coefficients
            ]
        )
        if mixer.skip:
            ones = partitioned(jax.nn.initializers.ones, "heads")
            self.skip = nnx.Param(ones(rngs.params(), (heads,), param_dtype))
        if mixer.biases:
            ones = partitioned(jax.nn.initializers.ones, "heads", None)
            shape = heads, self.head_dim
            self.query_bias, self.key_bias = (
                nnx.Param(ones(rngs.params(), shape, param_dtype)) for _ in range(2)
            )
        if mixer.bonus:
            zeros = partitioned(jax.nn.initializers.zeros, "heads", None)
            self.bonus = nnx.Param(zeros(rngs.params(), (heads, self.head_dim), param_dtype))
        if mixer.aggregation.relevance.connector == "key":
            self.connector, self.temperature = make_connector(
                self.query, heads, mixer.matched, in_features, **options
            )
        elif mixer.aggregation.relevance.connector is not None:
            raise ValueError(
                f"composed layers have no parameters for gate={mixer.aggregation.gate!r}: use "
                '"content" or "uniform"'
            )
        learn_borders(self, rngs)
        self.output = mixer.output.build(in_features, heads, self.value_dim, **options)

    @property
    def _paths(self) -> tuple[Rows, Rows, Rows]:
        return self.query, self.key, self.value

    def call_in_model(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None, first: Array
    ) -> tuple[Float[Array, "b t d"], Array]:
        """As a call, within a model whose layers mix in the values of its first.

        Takes the first layer's values and returns them, or its own if it is the first.
        """
        y, kept, _ = self._mix(x, document_ids, first)
        return y, first if kept is None or not self.shares_values else kept.values

    def extend_in_model(
        self, x: Float[Array, "b t d"], cache: LayerCache, lengths: Any, first: Array
    ) -> tuple[Float[Array, "b t d"], LayerCache, Array]:
        """As ``extend``, within such a model."""
        y, cache, kept, _ = self._mix_next(x, cache, lengths, first)
        return y, cache, kept.values if self.shares_values else first

    def _tokens(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None, first: Any
    ) -> tuple[dict[str, Any], Kept]:
        previous = previous_tokens(x, document_ids) if self.shifts else None
        inputs = LayerInput(x, previous)
        rows = self._projected(inputs, first)
        division = self._division([(row, "b t h") for row in rows], (document_ids, "b t"))
        values = rows[-1]
        rows = [
            path.conv(row, document_ids, division) if path.path.conv_width else row
            for path, row in zip(self._paths, rows, strict=True)
        ]
        tokens, _ = self._arguments(inputs, rows, division, None, None)
        return tokens, Kept(inputs, tokens, values)

    def _next_tokens(
        self,
        x: Float[Array, "b t d"],
        tails: tuple,
        counts: Int[Array, "b"],
        position: Int[Array, "b"],
        first: Any,
    ) -> tuple[dict[str, Any], Kept, tuple]:
        new, inputs = list(tails), LayerInput(x)
        if self.shifts:
            previous, tail = next_previous(x, tails[3], counts)
            new[3] = like(tails[3], tail)
            inputs = LayerInput(x, previous)
        rows = self._projected(inputs, first)
        pairs = [(row, "b . h") for row in (*rows, *tails[:3])]
        division, values = self._division(pairs), rows[-1]
        for i, path in enumerate(self._paths):
            if path.path.conv_width:
                rows[i], new[i] = path.conv.extend(rows[i], tails[i], counts, division)
        place = position[:, None] + jnp.arange(x.shape[1])[None]
        tail = (tails[-1], counts) if self.turns else None
        tokens, tail = self._arguments(inputs, rows, division, place, tail)
        if self.turns:
            new[-1] = like(tails[-1], tail)
        return tokens, Kept(inputs, tokens, values), tuple(new)

    def _projected(self, inputs: LayerInput, first: Any) -> list[Array]:
        mixed = [None if path.path.first is None else first for path in self._paths]
        return [path.project(inputs, x) for path, x in zip(self._paths, mixed, strict=True)]

    def _empty_tails(self, batch_size: int, dtype: DTypeLike) -> tuple:
        shapes = [path.tail_shape for path in self._paths]
        if self.shifts:
            shapes.append((1, self.in_features))
        tails = [jnp.zeros((batch_size, *shape), dtype) for shape in shapes]
        if self.turns:
            pairs = self.num_heads * self.head_dim // 2
            tails.append(jnp.zeros((batch_size, 2, pairs), jnp.promote_types(dtype, jnp.float32)))
        return tuple(tails)

    def _division(self, rows: list[tuple[Any, str]], *others: Any) -> Division | None:
        return Division.of(*rows, *others, heads=self.key.path.heads)

    def _arguments(
        self,
        inputs: LayerInput,
        rows: list[Array],
        division: Division | None,
        position: Int[Array, "b t"] | None,
        tail: Any,
    ) -> tuple[dict[str, Any], Any]:
        """The rule's arguments, and a stream's turns; ``tail`` as in ``turned``."""

        def lay(x: Array, heads: int) -> Array:
            x = x if division is None else division.lay(x, "b t h")
            return x.reshape(*x.shape[:2], heads, -1)

        query, key, value = (
            path.finish(lay(row, path.path.heads), position)
            for path, row in zip(self._paths, rows, strict=True)
        )
        repeats = self.num_heads // self.key.path.heads
        if repeats > 1:
            repeat = functools.partial(jnp.repeat, repeats=repeats, axis=2)
            query, key = (
                repeat(rows) if division is None else division.compute(repeat, rows, "b t h .")
                for rows in (query, key)
            )
        if hasattr(self, "query_bias"):
            query, key = (
                rows + bias[...].astype(rows.dtype)[None, None]
                for rows, bias in ((query, self.query_bias), (key, self.key_bias))
            )
        controls: dict[str, Array] = {}
        turns = None
        for part in self.coefficients:
            tokens = dict(query=query, key=key, value=value)
            made = part(inputs, lambda x: lay(x, self.num_heads), tokens)
            key = made.pop("key", key)
            turns = made.pop("turns", turns)
            controls |= made
        if (turns is not None) != self.turns:
            raise ValueError(
                "a part that makes turns must have a true attribute `turns`, and no other may, got "
                f"{[type(part).__name__ for part in self.coefficients]}"
            )
        if turns is not None:
            (query, key), tail = turned((query, key), turns, division, tail)
        for name, control in self.memory.controls.items():
            if control.per_head is not None and control.is_learned and name not in controls:
                controls[name] = control.per_head(self.num_heads)
        connector = None
        if hasattr(self, "connector"):
            raw = lay(self.connector(inputs.x), self.num_heads)
            connector = connect(raw, query, self.temperature[...], self.matched)
        made = dict(query=query, key=key, value=value, connector=connector, controls=controls)
        return made, tail

    def _output(
        self, x: Float[Array, "b t d"], y: Float[Array, "b t h v"], kept: Kept
    ) -> Float[Array, "b t d"]:
        value, bonus = kept.tokens["value"], None
        if hasattr(self, "skip"):
            y = y + self.skip[...].astype(y.dtype)[None, None, :, None] * value
        if hasattr(self, "bonus"):
            weight = self.bonus[...].astype(y.dtype)
            query, key = (kept.tokens[name].astype(y.dtype) for name in ("query", "key"))
            bonus = jnp.einsum("bthk,bthk,hk->bth", query, key, weight)[..., None] * value
        return self.output(kept.inputs, y, bonus)

    def _empty_output(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.output.out(self.value.linear(x))
