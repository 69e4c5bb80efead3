"""The Memory Caching layer: a drop-in for causal self-attention."""

from typing import Any, Literal, Unpack, get_args

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memcache_jax import _checks
from memcache_jax._typing import Exchange, Implementation, Start
from memcache_jax.aggregation import Aggregation
from memcache_jax.caching import check_configuration
from memcache_jax.memories import Memory
from memcache_jax.nn.borders import learn_borders
from memcache_jax.nn.groups import check_states
from memcache_jax.nn.host_options import HostOptions, read_host_options
from memcache_jax.nn.projections import Projections
from memcache_jax.segmentation import Segmentation
from memcache_jax.sharding.names import AxisNames, naming


def check_layer(
    memory: Any,
    aggregation: Any,
    segmentation: Any,
    start: Any,
    connector: Any,
    implementation: Any,
    exchange: Any,
) -> None:
    """Raises ValueError for arguments of ``MemoryCaching`` that no layer can have."""
    check_configuration(memory, aggregation, segmentation, start, implementation)
    _checks.check_choice("connector", connector, ("learned", "query", "previous"))
    _checks.check_choice("exchange", exchange, get_args(Exchange))


class MemoryCaching(Projections):
    """A recurrent memory with cached segment states, as a token mixer.

    The block of Titans and of App. B of arXiv:2602.24281: projections to q, k, v, a causal
    depthwise convolution on each, SiLU, L2 norm of q and k, memory caching, RMSNorm per head, an
    output gate and a projection. Aggregations with content gates also project the connector u,
    L2-normalised and scaled by a learned temperature per head. The rule's coefficients are linear
    maps of the input. W_k and W_u start as copies of W_q.

    Args:
      in_features: model dimension d of the input and the output.
      num_heads: heads h.
      memory: the write rule.
      aggregation: how reads of live and cached memories become one output.
      segmentation: where states are cached.
      head_dim: key and value dimension of a head; ``in_features // num_heads`` by default.
      start: what a segment's memory begins with, ``"independent"`` or ``"checkpoint"``.
      connector: what content gates compare with pooled keys: a ``"learned"`` map of the input, or
        the ``"query"``; or ``"previous"``, see ``MemoryCachingMixer``.
      distances: for position gates, the number of distances that have their own logit.
      conv_width: taps of the convolution.
      bounded: whether a deep memory without a ``max_step_norm`` gets one of 1, so that no input,
        however large, makes it diverge; False for the bare equation.
      states: ``"own"``, or ``"previous"`` for a layer of a language model that caches no states and
        reads those of an earlier layer, see ``MemoryCachingMixer``.
      implementation: as in ``memory_caching``; ``"pallas_gpu"`` cannot bound the steps of deep
        memories: give ``bounded=False`` with them.
      exchange: on a mesh that splits sequences, how the parts get each other's states:
        ``"gather"`` fetches all at once, ``"ring"`` one part's at a time, in less memory.
      dtype: dtype of the projections and of the output; by default the wider of the input's and
        ``param_dtype``, as in Flax. Memory states and gates are always float32 or wider.
      param_dtype: dtype of the parameters.
      axis_names: what the host calls the axes of parameters, its mesh's or logical names, by ours:
        ``{"embed": "fsdp", "heads": "model"}``. By default they are ``"embed"`` and ``"heads"``
        where logical rules in context have these names, and on a mesh of ``sharding.make_mesh``.
      rngs: random keys.
      host: what hosts pass to attention, such as ``kernel_init`` and ``use_bias``: see
        ``HostOptions``.

    Raises:
      TypeError: for an unknown keyword.
      ValueError: if ``num_heads`` does not divide ``in_features`` and no ``head_dim`` is given, if
        the memory's chunk size does not divide the segment size, for an unknown ``start`` or
        ``exchange``, or for what a host asks for and the layer does not do.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> layer = mc.nn.MemoryCaching(64, 4, memory=mc.memories.Titans(chunk_size=16),
      ...                             aggregation=mc.GRM(), segmentation=mc.Constant(64),
      ...                             rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 100, 64))).shape
      (2, 100, 64)
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        memory: Memory,
        aggregation: Aggregation,
        segmentation: Segmentation,
        head_dim: int | None = None,
        start: Start = "independent",
        connector: Literal["learned", "query", "previous"] = "learned",
        distances: int = 64,
        conv_width: int = 4,
        bounded: bool = True,
        states: Literal["own", "previous"] = "own",
        implementation: Implementation | None = None,
        exchange: Exchange = "gather",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        axis_names: AxisNames | None = None,
        rngs: nnx.Rngs,
        **host: Unpack[HostOptions],
    ) -> None:
        check_layer(memory, aggregation, segmentation, start, connector, implementation, exchange)
        check_states(states, connector, aggregation, segmentation, implementation)
        _checks.check_instance("rngs", rngs, nnx.Rngs, "nnx.Rngs, such as nnx.Rngs(0)")
        memory = memory.bounded() if _checks.check_flag("bounded", bounded) else memory
        distances = _checks.check_integer("distances", distances, 2)
        conv_width = _checks.check_integer("conv_width", conv_width)
        _checks.check_dtype("dtype", dtype, optional=True)
        _checks.check_dtype("param_dtype", param_dtype)
        in_features, num_heads = _checks.check_sizes(in_features=in_features, num_heads=num_heads)
        name = type(self).__name__
        head_dim, projections = read_host_options(name, in_features, num_heads, head_dim, **host)
        with naming(axis_names):
            super().__init__(
                in_features,
                num_heads,
                memory=memory,
                aggregation=aggregation,
                head_dim=head_dim,
                connector=connector,
                distances=distances,
                conv_width=conv_width,
                dtype=dtype,
                param_dtype=param_dtype,
                options_of=projections,
                rngs=rngs,
            )
            self.segmentation = segmentation
            learn_borders(self, rngs)
        self.states, self.follows = states, connector == "previous"
        self.start: Start = start
        self.implementation: Implementation | None = implementation
        self.exchange: Exchange = exchange
