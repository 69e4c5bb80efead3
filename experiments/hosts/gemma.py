"""Flax's example ``gemma``: its model with another attention, its train step and its sampler."""

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.hosts import _host

CHANGES = [
    (
        """\
from flax import nnx
import layers
""",
        """\
from flax import nnx
import memcache_jax as mc
import layers
""",
    ),
    (
        """\
    self.attn = Attention(
        num_heads=num_heads,
""",
        """\
    self.attn = mc.nn.adapters.GemmaAttention(
        mixer=mc.nn.MemoryCachingMixer(mc.memories.GatedDeltaNet(), mc.GRM(), mc.Constant(16)),
        num_heads=num_heads,
""",
    ),
]


def run(devices: int) -> list[_host.Row]:
    """Trains the example's model before and after the changes, and samples from the second."""
    sys.path.insert(0, str(_host.flax_sources() / "examples/gemma"))
    # What train.py and these import is TensorFlow, for a data set and for logs.
    for name in ("clu", "clu.metric_writers", "clu.periodic_actions", "input_pipeline"):
        sys.modules[name] = types.ModuleType(name)
    for name in ("metric_writers", "periodic_actions"):
        setattr(sys.modules["clu"], name, sys.modules[f"clu.{name}"])
    before, _ = train(devices)
    _host.change(_host.load("modules"), CHANGES)
    after, model = train(devices)
    result = f"loss {_host.fell(before)}; with our layer {_host.fell(after)}"
    if devices == 1:  # With rows divided over devices, the sampler's own masks do not broadcast.
        result += f"; the sampler's logits are those of whole rows, {sample(model):.0e}"
    lines = _host.count_lines(CHANGES)
    return [_host.Row("Flax example gemma", _host.version("flax"), lines, result)]


def train(devices: int, steps: int = 15) -> tuple[list[float], Any]:
    """Losses of the example's own ``nnx_train_step`` on packed rows with padding, and the model."""
    example, transformer = _host.load("train"), _host.load("transformer")
    transformer_cfg = _host.load("transformer_cfg")

    sharding = transformer_cfg.ShardingConfig()
    if devices > 1:
        sharding = sharding.fsdp_tp_sharding(tensor_parallel_axis_name="tensor")
    config = transformer_cfg.TransformerConfig(
        num_layers=2,
        num_embed=_host.VOCAB,
        embed_dim=32,
        hidden_dim=64,
        num_heads=2,
        head_dim=16,
        num_kv_heads=1,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(transformer_cfg.AttentionType.GLOBAL,) * 2,
        shd_config=sharding,
    )
    with _host.mesh(devices, ("fsdp", "tensor")):
        model = transformer.Transformer(config, rngs=nnx.Rngs(params=0, dropout=0))
        optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
        metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())
        step = nnx.jit(example.nnx_train_step, static_argnames=("pad_id", "with_capture"))
        rngs, batch, losses = nnx.Rngs(dropout=1), _packed(devices), []
        for _ in range(steps):
            metrics.reset()
            step(model, optimizer, rngs, batch, metrics, pad_id=_host.PAD, with_capture=True)
            losses.append(float(metrics.compute()["loss"]))
    return losses, nnx.view(model, deterministic=True)


def _packed(devices: int) -> dict[str, jax.Array]:
    """Two documents and padding in each row."""
    rows = _host.repeated()
    segments = jnp.asarray([[1] * 15 + [2] * 20 + [0] * 5] * len(rows))
    places = jnp.asarray([[*range(15), *range(20), *[0] * 5]] * len(rows))
    batch = dict(
        inputs=jnp.where(segments > 0, rows[:, :-1], _host.PAD),
        inputs_position=places,
        inputs_segmentation=segments,
        targets=rows[:, 1:],
    )
    return batch if devices == 1 else jax.device_put(batch, jax.P("fsdp"))


def sample(model: Any) -> float:
    """Prompts of two lengths: how far the sampler's logits are from those of whole rows."""
    sampler, transformer = _host.load("sampler"), _host.load("transformer")

    vocab: Any = _host.Numbers()
    draw = sampler.Sampler(vocab=vocab, cache_size=64, transformer=model)
    drawn = draw(_host.prompts(), total_generation_steps=9, echo=True)
    tokens = jnp.asarray(drawn.tokens)
    mask = transformer.make_causal_attn_mask(tokens > _host.PAD)
    places = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    whole, _ = nnx.jit(lambda model: model(tokens, places, None, mask))(model)
    error = float(np.abs(np.asarray(drawn.logits)[:, 1:] - np.asarray(whole)[:, :-1]).max())
    assert error < 1e-3, f"the sampler's logits differ from those of whole rows by {error}"
    return error
