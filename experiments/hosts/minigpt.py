"""Flax's page "Train a miniGPT language model": its ``nnx.MultiHeadAttention`` replaced."""

from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec, reshard

import memcache_jax as mc
from experiments.hosts import _host

CHANGES = [
    (
        """\
        self.mha = nnx.MultiHeadAttention(num_heads=num_heads,
              in_features=embed_dim,
              kernel_metadata={'out_sharding': P(None, 'model')},
              bias_metadata={'out_sharding': P('model')},
              rngs=rngs)
""",
        """\
        self.mha = mc.nn.MemoryCaching(num_heads=num_heads,
              in_features=embed_dim,
              memory=mc.memories.GatedDeltaNet(),
              aggregation=mc.GRM(),
              segmentation=mc.Constant(16),
              axis_names={'heads': 'model'},
              rngs=rngs)
""",
    ),
]


def run(devices: int) -> list[_host.Row]:
    """Trains the page's model before and after the changes."""
    page = _host.flax_sources() / "docs_nnx/examples/minigpt.md"
    before = _host.fell(train(page, [], devices))
    after = _host.fell(train(page, CHANGES, devices))
    lines = _host.count_lines(CHANGES)
    result = f"loss {before}; with our layer {after}"
    return [_host.Row("Flax miniGPT page", _host.version("flax"), lines, result)]


def train(page: Path, changes: list[tuple[str, str]], devices: int, steps: int = 20) -> list[float]:
    """Losses of the page's own ``train_step``."""
    parts = ("class TransformerBlock", "class TokenAndPosition", "class MiniGPT", "def loss_fn")
    blocks = _host.code_blocks(page.read_text())
    source = "\n".join(next(b for b in blocks if part in b) for part in parts)
    names: dict[str, Any] = dict(mc=mc, nnx=nnx, jax=jax, jnp=jnp, optax=optax, reshard=reshard)
    names |= dict(P=PartitionSpec, maxlen=64, vocab_size=_host.VOCAB, embed_dim=32, num_heads=2)
    names |= dict(feed_forward_dim=64)
    with jax.set_mesh(jax.make_mesh((devices, 1), ("batch", "model"))):
        exec(_host.patch(source, changes), names)
        model = names["create_model"](nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
        rows = _host.repeated()
        batch = jax.device_put((rows[:, :-1], rows[:, 1:]), PartitionSpec("batch", None))
        losses = []
        for _ in range(steps):
            metrics.reset()
            names["train_step"](model, optimizer, metrics, batch)
            losses.append(float(metrics.compute()["loss"]))
    return losses
