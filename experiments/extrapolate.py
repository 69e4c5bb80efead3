"""Measures the loss at every position, far past the training length.

    python -m experiments.extrapolate --config=configs/extrapolate.py --workdir=FOLDER

Trains models of one shape (a rule alone, with memory caching, and attention) on short rows of text,
each in ``WORKDIR/models/NAME`` as ``experiments.train`` does. The trained rule is also measured
with caches added after training, without new parameters (Sec. 4.3 of arXiv:2602.24281): it caches a
state every training length, and reads all states with equal weight. The result is the loss on
held-out rows several times as long, in bits per byte by position in the row. Rows are packed
documents, as in training. The same command resumes an interrupted study.

``--pretrained=FOLDER`` measures a public model instead, on the rows of ``config.training.data``;
``--segment`` also with caches of segments of so many tokens.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

import memcache_jax as mc
from experiments._fit import hidden_of
from experiments._public import PRETRAINED, SEGMENT
from experiments._study import Case, Row, Study, new_figure, run
from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn import LanguageModel, MemoryCachingMixer, Mixer
from memcache_jax.training import (
    CheckpointError,
    StoppedError,
    load_model,
    model_config,
    model_options,
    train,
)
from memcache_jax.training.config import to_json
from memcache_jax.training.corpus import load_corpus
from memcache_jax.training.durable import digest_of_all
from memcache_jax.training.pictures import tick_values
from memcache_jax.training.pretrained import digest_of_weights
from memcache_jax.training.tokenizers import end_token_of, published_tokenizer

_MODELS = ("base", "models", "segment", "top_k", "memory", "training")
_EVALUATION = ("eval_length", "eval_tokens", "eval_batch_size", "first_bin")
KEYS = (*_MODELS, *_EVALUATION)  # of the configuration

POST: Mapping[str, mc.Aggregation] = {
    "GRM after training": mc.GRM(gate="uniform"),
    "soup after training": mc.Soup(gate="uniform"),
}


def training_of(config: Any, name: str) -> dict[str, Any]:
    """Returns the training configuration of a preset in a study."""

    def changed(mixer: Any) -> Mixer:
        if not isinstance(mixer, MemoryCachingMixer):
            return mixer
        memory: Any = mixer.memory
        return dataclasses.replace(mixer, memory=dataclasses.replace(memory, **config.memory))

    mixers = mc.presets.mixers(name, segment=config.segment, top_k=config.top_k)
    model = model_config(config.training.model)
    model = dataclasses.replace(model, mixers=tuple(map(changed, mixers)))
    training = ConfigDict(to_json(config.training))
    training.resume = True  # an interrupted study resumes
    training.model = model_options(model)
    return to_json(training)


def groups(config: Any) -> list[list[Case]]:
    """Returns the cases of a study: each trained model, alone and with caches added after.

    Raises:
      ValueError: for invalid settings.
    """
    _check_sizes(config)
    if config.eval_length <= config.training.sequence_length:
        raise ValueError(
            f"eval_length must be above the training's {config.training.sequence_length}, "
            f"got {config.eval_length}"
        )
    evaluation = {name: config[name] for name in ("eval_length", "eval_tokens", "first_bin")}
    found = []
    for name in config.models:
        shared = dict(trained=name, training=training_of(config, name), **evaluation)
        post = POST if name == config.base else {}
        found.append(
            [dict(name=name, post=None, **shared)]
            + [dict(name=f"{name}, {how}", post=how, **shared) for how in post]
        )
    return found


def _check_sizes(config: Any) -> None:
    for name in ("first_bin", "eval_batch_size"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")


def public_group(config: Any, folder: str, segment: int | None) -> list[Case]:
    """Returns the cases of a public model: as it is, and with caches after each segment.

    They name the model by a digest of its files, which are read for it: a changed one is measured
    anew.
    """
    _check_sizes(config)
    others = [Path(folder) / f"{name}.json" for name in ("config", "tokenizer", "tokenizer_config")]
    texts = digest_of_all(file for file in others if file.is_file())
    digest = f"{digest_of_weights(Path(folder))} {texts}"
    data = to_json(config.training)["data"]
    evaluation = {name: config[name] for name in ("eval_length", "eval_tokens", "first_bin")}
    shared = dict(public=folder, digest=digest, segment=segment, data=data, **evaluation)
    name = Path(folder).name
    cases: list[Case] = [dict(name=name, post=None, **shared)]
    if segment is not None:
        cases += [dict(name=f"{name}, {how}", post=how, **shared) for how in POST]
    return cases


def measure_public(cases: list[Case], config: Any) -> list[Row]:
    """Measures a public model; the results are those of ``measure``."""
    folder = Path(cases[0]["public"])
    tokenizer = published_tokenizer(folder)
    training: Any = ConfigDict(to_json(config.training))
    training.data.tokenizer, training.data.eos_token = tokenizer.name, end_token_of(folder)
    model = mc.pretrained.load(folder)
    training.model.vocab_size = model.config.vocab_size
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return _measured(model, parameters, cases, training, cases[0]["segment"], config)


def measure(cases: list[Case], folder: Path, config: Any) -> list[Row]:
    """Trains the model of a group, unless that is done, and measures all its cases.

    Args:
      cases: the cases of one trained model.
      folder: the workdir of its training.
      config: of the study, which has the rows measured at a time.

    Returns:
      For each case ``bins`` of (begin, end, bits per byte), ``parameters``, and ``rows``.
    """
    training: Any = ConfigDict(cases[0]["training"])
    print(f"{cases[0]['trained']}: {folder}", flush=True)
    try:
        parameters = train(training, folder)["parameters"]
    except StoppedError as e:
        raise KeyboardInterrupt from e
    except CheckpointError as e:
        raise OSError(str(e)) from e
    trained, _, _ = load_model(folder)
    return _measured(trained, parameters, cases, training, training.sequence_length, config)


def _measured(
    trained: LanguageModel,
    parameters: int,
    cases: list[Case],
    training: Any,
    segment: int | None,
    config: Any,
) -> list[Row]:
    training.sequence_length = cases[0]["eval_length"]
    training.data.heldout_tokens = cases[0]["eval_tokens"]
    heldout = load_corpus(training).heldout
    rows = []
    for case in cases:
        model = trained
        if case["post"] is not None:
            assert segment is not None, "a case with caches has segments"
            model = mc.nn.with_memory_caching(
                trained, segmentation=mc.Constant(segment), aggregation=POST[case["post"]]
            )
        loss = loss_by_position(
            model, heldout.tokens, config.eval_batch_size, case.get("cache")
        ).mean(axis=0)
        bits = loss / math.log(2) / heldout.bytes_per_token
        bins = [
            (begin, end, round(float(bits[begin:end].mean()), 5))
            for begin, end in bin_edges(len(bits), case["first_bin"])
        ]
        rows.append(dict(bins=bins, parameters=parameters, rows=len(heldout.tokens)))
    return rows


def loss_by_position(
    model: LanguageModel,
    tokens: Int[np.ndarray, "rows l"],
    batch_size: int,
    cache: Mapping[str, Any] | None = None,
) -> Float[np.ndarray, "rows t"]:
    """Returns the loss of every next token in nats, t = l - 1 of them per row.

    Args:
      model: the model.
      tokens: token ids.
      batch_size: rows at a time.
      cache: options of ``init_cache``, to read as a stream; by default in one pass.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def losses(state: Any, tokens: Array) -> Array:
        model = nnx.merge(graph, state)
        hidden = hidden_of(model, tokens[:, :-1], cache)
        return -model.token_scores(hidden, tokens[:, 1:]).log_probability

    parts = []
    for begin in range(0, len(tokens), batch_size):
        # The first rows fill up the last batch, so that all have one shape.
        batch = tokens[np.arange(begin, begin + batch_size) % len(tokens)]
        parts.append(np.asarray(losses(state, batch)))
    return np.concatenate(parts)[: len(tokens)]


def bin_edges(length: int, first: int) -> list[tuple[int, int]]:
    """Returns bins of positions that end at first, 2 first, 4 first, ..., and at length."""
    ends = [first << i for i in range(64) if first << i < length]
    return list(zip([0, *ends], [*ends, length], strict=True))


def picture(rows: list[Row]) -> Any:
    """Plots bits per byte by position, with a line at the training length."""
    figure, ((axis,),) = new_figure(1, size=(7.5, 4.8))
    for row in rows:
        middle = [(begin + end) / 2 for begin, end, _ in row["bins"]]
        axis.plot(middle, [bits for *_, bits in row["bins"]], label=row["name"])
    first = rows[0]
    what, length = "segment", first.get("segment")
    if "training" in first:
        what, length = "training length", first["training"]["sequence_length"]
    if length is not None:
        axis.axvline(length, color="gray", linestyle="--", linewidth=1)
        axis.text(length, 0.99, f" {what}", transform=axis.get_xaxis_transform(), va="top")
    tick_values(axis, [end for _, end, _ in first["bins"]])
    axis.set(xlabel="position", ylabel="bits per byte, held out")
    axis.legend(fontsize="small")
    return figure


def program(config: Any, study: Study, cases: list[list[Case]] | None = None) -> None:
    """Trains and measures the missing cases; writes the table and the picture.

    Args:
      config: of the study.
      study: the study.
      cases: in groups; those of the configuration's models by default.
    """

    def measure_group(cases: list[Case]) -> list[Row]:
        if "public" in cases[0]:
            return measure_public(cases, config)
        return measure(cases, study.workdir / "models" / cases[0]["trained"], config)

    rows = study.measure(groups(config) if cases is None else cases, measure_group)
    study.write_table(
        ["model", "parameters", *(f"to {end}" for _, end, _ in rows[0]["bins"])],
        [
            [row["name"], f"{row['parameters']:,}", *(bits for *_, bits in row["bins"])]
            for row in rows
        ],
    )
    study.write_picture(picture(rows), "extrapolate")


def _groups(config: Any) -> list[list[Case]]:
    """The cases that the flags ask for."""
    if PRETRAINED.value is not None:
        return [public_group(config, PRETRAINED.value, SEGMENT.value)]
    if SEGMENT.value is not None:
        raise ValueError("--segment is for --pretrained: config.segment is that of the study")
    return groups(config)


if __name__ == "__main__":
    run(lambda config, study: program(config, study, _groups(config)), KEYS)
