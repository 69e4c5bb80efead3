"""Looks for needles in haystacks.

    python -m experiments.needle --config=FILE --workdir=FOLDER

With ``config.trained``, workdirs of ``experiments.train``, runs RULER's S-NIAH-1 to 3
(arXiv:2404.06654) by greedy generation at exact lengths and depths, in tokens of the run's own
tokenizer. Otherwise runs a light version: trains small models on short rows and tests them on long
ones; an answer is right if all its digits are the most likely tokens. The workdir gets
``results.json``, ``table.md`` and ``needle.png`` (length by depth). The same command resumes an
interrupted study.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import memcache_jax as mc
from experiments._fit import Recipe, Replica, fit
from experiments._needles import LITE_VOCABULARY, essay, found, lite, needle
from experiments._recall import groups, model_and_cache, recall_model, state_bytes
from experiments._study import Case, Row, Study, mean_and_spread, new_figure, run
from memcache_jax.training import load_model
from memcache_jax.training.pictures import MAP

TASK = (  # what results of the light version depend on
    "train",
    "lengths",
    "depths",
    "test_examples",
    "batch_size",
    "steps",
    "warmup_steps",
    "weight_decay",
)


_AT_ONCE = 8  # rows per batch of generation


def needle_config() -> Any:
    """Returns the default configuration of the study, for the files in ``configs/``."""
    config = ConfigDict()
    config.lengths = (128, 256, 512, 1024)  # tokens of a row
    config.depths = 5  # number of positions of the needle, from the beginning to the end
    # For trained models; everything below `samples` is for the light version.
    config.trained = ()  # workdirs of experiments.train
    config.tasks = (1, 2, 3)  # of S-NIAH
    config.samples = 500  # per task and length, over all depths
    config.models = ("ssd", "ssd_grm", "ssd_ssc", "attention")  # mc.presets.NAMES and attention
    config.width = 64
    config.num_layers = 2
    config.num_heads = 2
    config.head_dim = 16
    config.segment = 16
    config.top_k = 2
    config.learning_rates = (1e-2,)
    config.seeds = (0,)
    config.at_once = 1  # models trained side by side in one program
    config.workers = 1  # processes that train side by side, on CPUs
    config.train = (64, 128)  # lengths
    config.test_examples = 64  # per length and depth
    config.batch_size = 32
    config.steps = 1000
    config.warmup_steps = 100
    config.weight_decay = 0.1
    return config


def program(config: Any, study: Study) -> None:
    """Measures the models, then writes the table and the picture."""
    rows = _ruler(config, study) if config.trained else _light(config, study)
    names = list(dict.fromkeys(row["name"] for row in rows))
    grids = {
        name: np.array([row["accuracy"] for row in rows if row["name"] == name]) for name in names
    }
    study.write_table(
        ["model", *(f"{length} tokens" for length in config.lengths)],
        [
            [name, *(mean_and_spread(list(grid[:, i].mean(axis=-1))) for i in range(grid.shape[1]))]
            for name, grid in grids.items()
        ],
    )
    study.write_picture(picture(config, grids), "needle")


def _light(config: Any, study: Study) -> list[Row]:
    models = {
        name: recall_model(config, name, config.width, LITE_VOCABULARY) for name in config.models
    }
    return study.measure(groups(config, models, TASK), measure_light, workers=config.workers)


def measure_light(cases: list[Case]) -> list[Row]:
    """Trains and tests the models of a group on light needles.

    Returns:
      For each case ``accuracy`` by length and depth, and ``state_bytes`` by length.
    """
    task = cases[0]["task"]
    recipe = Recipe(
        **{key: task[key] for key in ("steps", "batch_size", "weight_decay", "warmup_steps")}
    )
    replicas = [Replica(case["seed"], case["learning_rate"]) for case in cases]
    model, cache = model_and_cache(cases[0]["model"])
    sources = [lite(length) for length in task["train"]]
    fitted = fit(model, sources, replicas, recipe, name=cases[0]["name"])
    keys = jax.random.split(jax.random.key(1_000_000), task["test_examples"])

    def accuracy(length: int, depth: float) -> np.ndarray:
        questions = jax.tree.map(np.asarray, jax.vmap(lite(length, depth))(keys))
        right = fitted.answers(questions, task["test_examples"], cache)
        return right.all(axis=-1).mean(axis=-1)

    depths = _depths(task["depths"])
    grid = np.array([[accuracy(length, at) for at in depths] for length in task["lengths"]])
    sizes = {str(n): state_bytes(model, n, cache) for n in task["lengths"]}
    return [dict(accuracy=grid[..., i].tolist(), state_bytes=sizes) for i in range(len(cases))]


def _ruler(config: Any, study: Study) -> list[Row]:
    cases = []
    for workdir in config.trained:
        steps = load_model(workdir)[2].steps
        cases += [
            dict(
                name=f"{workdir}, task {task}",
                workdir=str(Path(workdir).absolute()),
                steps=steps,
                task=task,
                lengths=list(config.lengths),
                depths=config.depths,
                samples=config.samples,
            )
            for task in config.tasks
        ]
    return study.measure([[case] for case in cases], measure_ruler)


def measure_ruler(cases: list[Case]) -> list[Row]:
    """Tests a trained model on one task, and returns its ``accuracy`` by length and depth."""
    (case,) = cases
    model, tokenizer, _ = load_model(case["workdir"])
    random, prose = np.random.RandomState(case["task"]), essay()
    depths = _depths(case["depths"])
    samples = -(-case["samples"] // len(depths))

    def count(text: str) -> int:
        return len(tokenizer.encode(text.encode()))

    def accuracies(length: int) -> list[float]:
        """Returns the accuracy at each depth; all prompts have one shape."""
        needles = [
            needle(case["task"], length, depth, count=count, random=random, prose=prose)
            for depth in depths
            for _ in range(samples)
        ]
        room = max(count(f" {each.value}") for each in needles) + 4
        texts = []
        for begin in range(0, len(needles), _AT_ONCE):
            rows = [
                tokenizer.encode(needles[i % len(needles)].prompt.encode())
                for i in range(begin, begin + _AT_ONCE)
            ]
            prompt = np.zeros((len(rows), length), np.int32)
            for line, row in zip(prompt, rows, strict=True):
                line[: len(row)] = row
            lengths = np.array([len(row) for row in rows])
            tokens = mc.generate(model, prompt, room, lengths=lengths, temperature=0.0)
            texts += [
                tokenizer.decode(np.asarray(line)[n : n + room].tolist())
                for line, n in zip(tokens, lengths, strict=True)
            ]
        return [
            found(needles[i : i + samples], texts[i : i + samples])
            for i in range(0, len(needles), samples)
        ]

    return [dict(accuracy=[accuracies(length) for length in case["lengths"]])]


def _depths(count: int) -> list[float]:
    return np.linspace(0, 1, count).tolist() if count > 1 else [0.5]


def picture(config: Any, grids: dict[str, np.ndarray]) -> Any:
    """Plots length by depth for each model, as means over seeds."""
    columns = min(4, len(grids))
    figure, axes = new_figure(columns, -(-len(grids) // columns), size=(3.2, 2.6))
    image = None
    for axis in axes.flat[len(grids) :]:
        axis.axis("off")
    for axis, (name, grid) in zip(axes.flat, grids.items(), strict=False):
        image = axis.imshow(grid.mean(axis=0).T, vmin=0, vmax=1, cmap=MAP, aspect="auto")
        axis.set_xticks(range(len(config.lengths)), list(map(str, config.lengths)))
        depths = _depths(config.depths)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set(title=name, xlabel="tokens", ylabel="depth")
        axis.grid(visible=False)
    figure.colorbar(image, ax=axes, label="accuracy")
    return figure


if __name__ == "__main__":
    run(program, needle_config().keys())
