"""Associative recall: trains a model on MQAR and tests it, also at other lengths."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from experiments._fit import Recipe, Replica, fit
from experiments._mqar import on_device, zoology
from experiments._routers import found
from experiments._study import Case, Row
from memcache_jax import GRM, Constant, presets
from memcache_jax.memories import Vector
from memcache_jax.nn import LanguageModel, LanguageModelConfig, MemoryCachingMixer
from memcache_jax.training import model_config, model_options
from memcache_jax.training.config import to_json


def recall_config() -> Any:
    """Returns the default configuration of a recall study, for the files in ``configs/``."""
    config = ConfigDict()
    config.models = ("ssd", "ssd_grm", "ssd_ssc", "attention")  # mc.presets.NAMES and attention
    config.widths = (64,)  # model dimensions
    config.learning_rates = (1e-2,)  # the best one is reported
    config.seeds = (0,)
    config.at_once = 1  # models trained side by side in one program
    config.workers = 1  # processes that train side by side, on CPUs
    config.num_layers = 2
    config.num_heads = 2
    config.head_dim = 16  # of keys and values
    config.segment = 16
    config.top_k = 2  # cached states that SSC reads
    config.vocab_size = 272
    config.random_tokens = True  # between queries, instead of zeros
    config.train = ((32, 8, 0), (64, 16, 0), (128, 32, 0))  # length, pairs, examples; 0: all new
    config.test = ((128, 32), (256, 32), (256, 64))  # length, pairs
    config.test_examples = 256
    config.batch_size = 32
    config.steps = 2000
    config.warmup_steps = 100
    config.weight_decay = 0.1
    return config


_TASK = (
    "vocab_size",
    "random_tokens",
    "train",
    "test",
    "test_examples",
    "batch_size",
    "steps",
    "warmup_steps",
    "weight_decay",
)


def recall_model(config: Any, name: str, width: int, vocab_size: int) -> dict[str, Any]:
    """Returns the ``config.model`` of a preset in a study, without MLP and with tied embeddings.

    ``"attention"`` is softmax attention with the same projections and convolutions, without
    positions: memory caching with segments of a single token.
    """
    if name == "attention":
        mixers = (MemoryCachingMixer(Vector(), GRM(), Constant(1)),)
    else:
        mixers = presets.mixers(name, segment=config.segment, top_k=config.top_k)
    model = LanguageModelConfig(
        vocab_size=vocab_size,
        num_layers=config.num_layers,
        features=width,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        mixers=mixers,
        mlp_features=0,
        tie_embeddings=True,
    )
    return to_json(model_options(model))


def recall_groups(config: Any, models: Mapping[str, Mapping[str, Any]]) -> list[list[Case]]:
    """Returns the cases of a study: each model with each learning rate and seed.

    Args:
      config: as ``recall_config``.
      models: ``config.model`` of each model.

    Raises:
      ValueError: for invalid settings.
    """
    return groups(config, models, _TASK)


def groups(
    config: Any, models: Mapping[str, Mapping[str, Any]], task_keys: Sequence[str]
) -> list[list[Case]]:
    """``recall_groups`` for a task with other settings."""
    for name in ("models", "learning_rates", "seeds", "at_once", *task_keys):
        value = config[name]
        if isinstance(value, tuple) and not value:
            raise ValueError(f"{name} must not be empty")
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if bad := [seed for seed in config.seeds if not 0 <= seed < 2**32]:
        raise ValueError(f"seeds must be in [0, 2**32), got {bad}")
    task = {name: to_json(config)[name] for name in task_keys}
    found = []
    for name, options in models.items():
        cases = [
            dict(name=name, seed=seed, learning_rate=rate, model=dict(options), task=task)
            for rate in config.learning_rates
            for seed in config.seeds
        ]
        found += [cases[i : i + config.at_once] for i in range(0, len(cases), config.at_once)]
    return found


def measure_recall(cases: list[Case]) -> list[Row]:
    """Trains and tests the models of a group.

    Returns:
      For each case ``accuracy`` by length and pairs (of a stream, if the model's options have
      ``cache``), the last mean ``loss`` (None if the model
      diverged), ``parameters``, and ``state_bytes``: the size of a stream's cache by length. Cases
      with ``router`` (fields of ``Recipe``) also get ``found``, see ``experiments.routers``.
    """
    task = cases[0]["task"]
    model, cache = model_and_cache(cases[0]["model"])
    sources = [
        on_device(
            length,
            pairs,
            vocab_size=task["vocab_size"],
            random_tokens=task["random_tokens"],
        )
        for length, pairs, _ in task["train"]
    ]
    recipe = Recipe(
        steps=task["steps"],
        batch_size=task["batch_size"],
        weight_decay=task["weight_decay"],
        warmup_steps=task["warmup_steps"],
        examples=tuple(examples for _, _, examples in task["train"]),
        **cases[0].get("router", {}),
    )
    replicas = [Replica(case["seed"], case["learning_rate"]) for case in cases]
    fitted = fit(model, sources, replicas, recipe, name=cases[0]["name"])
    rows: list[Row] = [
        dict(accuracy={}, state_bytes={}, loss=float(loss) if np.isfinite(loss) else None)
        for loss in fitted.losses
    ]
    for i, (length, pairs) in enumerate(task["test"]):
        questions = zoology(
            length,
            pairs,
            vocab_size=task["vocab_size"],
            examples=task["test_examples"],
            seed=1_000_000 + i,
            random_tokens=task["random_tokens"],
        )
        right = fitted.answers(questions, min(task["test_examples"], 64), cache)
        size = state_bytes(model, length, cache)
        for row, mine in zip(rows, right, strict=True):
            row["accuracy"][f"{length}/{pairs}"] = round(float(mine.mean()), 5)
            row["state_bytes"][str(length)] = size
        if "router" in cases[0]:
            for row, shares in zip(rows, found(fitted, questions), strict=True):
                row.setdefault("found", {})[f"{length}/{pairs}"] = shares
    parameters = sum(x.size for x in jax.tree.leaves(fitted.params)) // len(cases)
    return [row | dict(parameters=parameters) for row in rows]


def model_and_cache(options: Mapping[str, Any]) -> tuple[LanguageModelConfig, dict[str, Any]]:
    """The model of a ``config.model``, and its ``cache``: options of ``init_cache``, if any."""
    options = dict(options)
    cache = dict(options.pop("cache", {}))
    return model_config(ConfigDict(options)), cache


def state_bytes(
    model: LanguageModelConfig, length: int, cache: Mapping[str, Any] | None = None
) -> int:
    """Returns the bytes of a stream's cache with room for ``length`` tokens."""

    def empty() -> Any:
        return LanguageModel(model, rngs=nnx.Rngs(0)).init_cache(1, length, **(cache or {}))

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(empty)))


def best(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns, for each model, the rows at the learning rate with the best mean over seeds."""

    def score(rows: Sequence[Row]) -> float:
        return sum(sum(row["accuracy"].values()) for row in rows) / len(rows)

    found: dict[str, list[Row]] = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        rates = dict.fromkeys(row["learning_rate"] for row in mine)
        found[name] = max(
            ([row for row in mine if row["learning_rate"] == rate] for rate in rates), key=score
        )
    return found
