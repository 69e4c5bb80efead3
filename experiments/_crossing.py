"""What a layer moves between chips: its memory's operation, beside attention of the same shape."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import memcache_jax as mc
from experiments._advice import memory_mixers
from experiments._hlo import collectives, printed
from memcache_jax.nn.attend import attend_causally
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.layout import as_spec
from memcache_jax.sharding.names import mesh_axes
from memcache_jax.training.pretrained import PublicModel, run_model


def crossing(
    config: Any, mesh: Any, options: dict[str, Any]
) -> Iterator[tuple[str, str, dict[str, tuple[int, int]]]]:
    """The collectives of ``mc.memory_caching`` and of attention, forward and in a gradient.

    Attention gathers the keys and values of all parts, which is what ring attention passes around:
    P - 1 hops of a part of each, where the gathered arrays here have the chip's own part too.

    Args:
      config: of a run whose first mixer with a memory is taken.
      mesh: the mesh, of described devices.
      options: of the compiler.

    Yields:
      The operation, the pass and what ``collectives`` returns, each when it is compiled.

    Raises:
      ValueError: for a model without memories.
    """
    mixers, model = memory_mixers(config), run_model(config, PublicModel.of(config, digest=False))
    if not mixers:
        raise ValueError(f"--layer needs a model with a memory, its mixers are {model.mixers}")
    mixer = mixers[0]

    def operands() -> dict[str, Any]:
        sizes = model.features, model.num_heads
        layer = mixer.build(*sizes, dtype=model.dtype, rngs=nnx.Rngs(0))
        shape = config.batch_size, config.sequence_length, model.features
        return layer.operands(jnp.zeros(shape, model.dtype))

    def laid(x: Any) -> Any:
        names = ("batch", "time", "heads") if x.ndim > 2 else ("heads",)
        spec = as_spec([mesh_axes(name, mesh.abstract_mesh) for name in names])
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    arrays = jax.tree.map(laid, jax.eval_shape(operands))
    names = ("memory", "aggregation", "segmentation", "start", "exchange")
    how: dict[str, Any] = {name: getattr(mixer, name) for name in names}
    rows = {name: arrays[name] for name in ("query", "key", "value")}
    for name, run, given in (
        (type(mixer.memory).__name__, lambda x: mc.memory_caching(**x, **how), arrays),
        ("attention", _attention, rows),
    ):
        passes = {"forward": (run, given), "gradient": _gradient(run, given)}
        for kind, (function, *arguments) in passes.items():
            compiled = jax.jit(function).lower(*arguments).compile(compiler_options=options)
            yield name, kind, collectives(printed(compiled))


def _attention(rows: dict[str, Any]) -> jax.Array:
    """Causal attention of rows that lie on a mesh."""
    letters = "b t h ."
    division = Division.of((rows["query"], letters))
    assert division is not None

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        def turn(x: jax.Array, place: Any) -> jax.Array:
            return x

        how: Any = dict(window=None, turn=turn, implementation=None, division=division)
        return attend_causally(query, key, value, None, **how)

    return division.run(attend, tuple(rows.values()), (letters,) * 3, letters)


def _gradient(run: Callable, given: Any) -> tuple:
    """The gradient of what an operation returns, forward pass included, and its arguments."""
    out = jax.eval_shape(run, given)
    like: Any = given["value"]
    cotangent = jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=like.sharding)
    return (lambda given, y: jax.vjp(run, given)[1](y)), given, cotangent
