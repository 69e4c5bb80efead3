"""The optimizer: one of optax's by name, with gradient clipping, warm-up and cosine decay."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memcache_jax._typing import Array
from memcache_jax.training.config import Config


def make_schedule(options: Config, steps: int) -> Callable[[Any], Any]:
    """Returns the learning rate by step: a linear rise, then half a cosine.

    Args:
      options: ``learning_rate`` (the peak), ``warmup_steps``, ``final_fraction`` of the peak at the
        last step.
      steps: length of the schedule.

    Raises:
      ValueError: if the warm-up does not end before the last step.
    """
    peak, warmup = options["learning_rate"], options["warmup_steps"]
    if not 0 <= warmup < steps:
        raise ValueError(
            f"optimizer.warmup_steps must be in [0, steps), got {warmup} for steps={steps}"
        )
    length = max(steps - 1 - warmup, 1)
    # In fractions of its length: with counts it rounds differently from earlier versions.
    cosine = optax.cosine_decay_schedule(peak, decay_steps=1, alpha=options["final_fraction"])

    def rise(count: Any) -> Array:
        # Starts above zero, which would waste the first step.
        return peak * jnp.minimum((count + 1) / (warmup + 1), 1.0)

    return optax.join_schedules([rise, lambda count: cosine(count / length)], [warmup])


def make_optimizer(options: Config, steps: int) -> optax.GradientTransformation:
    """Returns an optimizer of optax, by default ``optax.adamw``, behind a clipped gradient norm.

    Only matrices decay: leaves called ``kernel`` or ``embedding``, but not the few taps of
    ``*_conv``. Initial weights of deep memories, norms, temperatures and biases do not.

    Args:
      options: those of ``make_schedule``; ``clip_norm``; ``name``, a function of optax that takes
        ``learning_rate``; ``weight_decay``, ``b1`` and ``b2``, passed if it takes them; and
        ``arguments``, any others of its own.
      steps: length of the schedule.

    Raises:
      ValueError: for an unknown optimizer or argument, or as ``make_schedule`` does.
    """
    name, arguments = options.get("name", "adamw"), dict(options.get("arguments", {}))
    optimizer = getattr(optax, name, None)
    known = inspect.signature(optimizer).parameters if inspect.isfunction(optimizer) else {}
    if optimizer is None or "learning_rate" not in known:
        raise ValueError(
            f"optimizer.name must be an optimizer of optax, such as adamw or lion, got {name!r}"
        )
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(
            f"optimizer.arguments must be of optax.{name}: {', '.join(known)}; got {unknown}"
        )
    usual = {key: options[key] for key in ("weight_decay", "b1", "b2")} | {"mask": decays}
    arguments = {key: value for key, value in usual.items() if key in known} | arguments
    return optax.chain(
        optax.clip_by_global_norm(options["clip_norm"]),
        optimizer(make_schedule(options, steps), **arguments),
    )


def decays(params: Any) -> Any:
    """Returns for each parameter whether weight decay applies to it, as in ``make_optimizer``."""

    def is_matrix(path: tuple[Any, ...], _: Array) -> bool:
        parent, name = ("", *(str(key.key) for key in path))[-2:]
        return name in ("kernel", "embedding") and not parent.endswith("_conv")

    return jax.tree_util.tree_map_with_path(is_matrix, params)
