"""The optimizer: AdamW with gradient clipping, warm-up and cosine decay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memcache_jax._typing import Array
from memcache_jax.training.config import Config


def make_schedule(options: Config, steps: int) -> Callable[[Any], Array]:
    """Returns the learning rate by step: a linear rise, then half a cosine.

    Args:
      options: ``learning_rate`` (the peak), ``warmup_steps``, ``final_fraction`` of the peak at the
        last step.
      steps: length of the schedule.

    Raises:
      ValueError: if the warm-up does not end before the last step.
    """
    peak, warmup = options["learning_rate"], options["warmup_steps"]
    final = options["final_fraction"]
    if not 0 <= warmup < steps:
        raise ValueError(
            f"optimizer.warmup_steps must be in [0, steps), got {warmup} for steps={steps}"
        )

    def schedule(count: Any) -> Array:
        # The first step is part of the rise: at a rate of zero it would be wasted.
        rise = jnp.minimum((count + 1) / (warmup + 1), 1.0)
        progress = jnp.clip((count - warmup) / max(steps - 1 - warmup, 1), 0.0, 1.0)
        fall = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return peak * rise * fall

    return schedule


def make_optimizer(options: Config, steps: int) -> optax.GradientTransformation:
    """Returns AdamW behind a clipped global gradient norm, with the rate of ``make_schedule``.

    Only matrices decay: leaves called ``kernel`` or ``embedding``, but not the few taps of
    ``*_conv``. Initial weights of deep memories, norms, temperatures and biases do not.

    Args:
      options: those of ``make_schedule``, ``weight_decay``, ``b1``, ``b2``, ``clip_norm``.
      steps: length of the schedule.

    Raises:
      ValueError: as ``make_schedule`` does.
    """
    return optax.chain(
        optax.clip_by_global_norm(options["clip_norm"]),
        optax.scale_by_adam(b1=options["b1"], b2=options["b2"]),
        optax.add_decayed_weights(options["weight_decay"], mask=decays),
        optax.scale_by_learning_rate(make_schedule(options, steps)),
    )


def decays(params: Any) -> Any:
    """Returns for each parameter whether weight decay applies to it, as in ``make_optimizer``."""

    def is_matrix(path: tuple[Any, ...], _: Array) -> bool:
        parent, name = ("", *(str(key.key) for key in path))[-2:]
        return name in ("kernel", "embedding") and not parent.endswith("_conv")

    return jax.tree_util.tree_map_with_path(is_matrix, params)
