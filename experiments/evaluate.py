"""Evaluates a trained model on tasks of lm-evaluation-harness.

    python -m experiments.evaluate --workdir=FOLDER --tasks=paper_commonsense,wikitext

``FOLDER`` is the workdir of ``experiments.train``; the program loads its newest checkpoint.
``--pretrained=FOLDER --max_length=TOKENS`` reads a public model instead, and ``--segment`` gives it
caches. Needs ``pip install '.[eval]'``, and internet access for the tasks' data.

Tasks come from lm-evaluation-harness, from ``experiments/tasks`` and from ``--include_path``. The
paper's sets expand to these tasks:

- ``paper_commonsense``: wikitext, lambada_openai, piqa, hellaswag, winogrande, arc_easy,
  arc_challenge, social_iqa, boolq.
- ``paper_retrieval``: swde, fda, squad_completion, cloze_triviaqa, cloze_drop, cloze_nq. Contexts
  of the last three are cut to ``--context_length`` around the answer.
- ``paper_needle``: niah_single_1 to 3; needs ``pip install 'lm-eval[ruler]'`` and
  ``--metadata='{"max_seq_lengths": [4096, 8192, 16384], "tokenizer": "DIR"}'``, where DIR is a
  folder with a Transformers tokenizer.
- ``paper_longbench``: fourteen tasks, longbench_narrativeqa to longbench_repobench-p; needs
  ``pip install 'lm-eval[longbench]'``. LongBench drops the middle of long prompts:
  ``--truncate=middle --max_length=16384``.

Results go to ``FOLDER/eval/results.json``, one entry per task, written as soon as it is measured.
The program skips tasks already measured with the same parameters and settings; different ones get
separate entries.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments._program import run
from experiments._source import is_public, read_source, source

_TASKS = flags.DEFINE_list("tasks", None, "Names of tasks, groups or sets.", required=True)
_INCLUDE_PATH = flags.DEFINE_list("include_path", [], "Folders with additional task files.")
_LIMIT = flags.DEFINE_integer("limit", None, "Examples per task; all by default.", 1)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Few-shot examples; the task's by default.", 0
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows per batch.", 1)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Maximum tokens that the model reads; a run's own by default.", 1
)
_TRUNCATE = flags.DEFINE_enum(
    "truncate", "left", ["left", "middle"], "Which part of a too long prompt to drop."
)
_CONTEXT_LENGTH = flags.DEFINE_integer(
    "context_length",
    None,
    "Tokens of a context in the cloze tasks; the tasks' own if unset.",
    1,
)
_METADATA = flags.DEFINE_string("metadata", "{}", "Options of tasks that generate data, as JSON.")
_OUTPUT = flags.DEFINE_string("output", None, "Results; FOLDER/eval/results.json by default.")

_LONGBENCH = (
    "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique gov_report qmsum multi_news "
    "trec triviaqa samsum lcc repobench-p"
)
# The paper's sets, with the metric it reports for each task; the needle has one per length.
SETS: dict[str, dict[str, str | None]] = {
    "paper_commonsense": {
        "wikitext": "word_perplexity",
        "lambada_openai": "acc",
        "piqa": "acc",
        "hellaswag": "acc_norm",
        "winogrande": "acc",
        "arc_easy": "acc",
        "arc_challenge": "acc_norm",
        "social_iqa": "acc",
        "boolq": "acc",
    },
    "paper_retrieval": dict.fromkeys(
        ("swde", "fda", "squad_completion", "cloze_triviaqa", "cloze_drop", "cloze_nq"), "contains"
    ),
    "paper_needle": dict.fromkeys((f"niah_single_{i}" for i in (1, 2, 3)), None),
    "paper_longbench": {f"longbench_{name}": "score" for name in _LONGBENCH.split()},
}
OWN_TASKS = Path(__file__).parent / "tasks"


def program() -> None:
    """Evaluates the tasks and prints a table."""
    # Stops lm-evaluation-harness from forking, which JAX's threads do not survive.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        from lm_eval import __version__ as version
    except ImportError as e:
        raise ImportError(f"{e}: pip install '.[eval]' in a checkout of memcache_jax") from e
    from experiments._lm_eval import TrainedLM
    from memcache_jax.training.durable import replace_file

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Flags are checked before anything large is read.
    max_length = _MAX_LENGTH.value
    if is_public() and max_length is None:
        raise ValueError("give --max_length, the most tokens that the public model reads")
    output = Path(_OUTPUT.value or source() / "eval" / "results.json")
    entries = _read(output)
    metadata = _metadata()
    names = list(dict.fromkeys(task for name in _TASKS.value for task in SETS.get(name, [name])))
    manager = _task_manager(names, {**metadata, "workdir": os.path.abspath(source())})
    model, tokenizer, config = read_source()
    if max_length is None:
        max_length = config.sequence_length
    options: dict[str, Any] = dict(max_length=max_length, truncate=_TRUNCATE.value)
    lm = TrainedLM(model, tokenizer, batch_size=_BATCH_SIZE.value, **options)
    settings = {
        "parameters": _fingerprint(model, config),
        **options,
        "limit": _LIMIT.value,
        "num_fewshot": _NUM_FEWSHOT.value,
        "metadata": metadata,
        "lm_eval": version,
    }
    measured = []
    for name in names:
        mine = {**settings, "task_file": _task_file(manager.task_index[name])}
        entry = next((e for e in entries if (e["task"], e["settings"]) == (name, mine)), None)
        if entry is not None:
            print(f"{name}: measured before, on {entry['date']}", flush=True)
        else:
            print(f"{name}: measuring", flush=True)
            entry = {"task": name, "settings": mine, **_measure(lm, name, manager)}
            entries.append(entry)
            output.parent.mkdir(parents=True, exist_ok=True)
            replace_file(output, json.dumps(entries, indent=1) + "\n")
        measured.append(entry)
    print(table(measured))
    print(f"written: {output}")


def _measure(lm: Any, name: str, manager: Any) -> dict[str, Any]:
    """Evaluates one task, and returns its entry."""
    from lm_eval.evaluator import simple_evaluate

    began = time.monotonic()
    results: Any = simple_evaluate(
        lm,
        tasks=[name],
        task_manager=manager,
        limit=_LIMIT.value,
        num_fewshot=_NUM_FEWSHOT.value,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - began, 1),
        "batch_size": lm.batch_size,
        **{key: results[key] for key in ("results", "versions", "n-shot", "n-samples")},
    }


def _metadata() -> dict[str, Any]:
    try:
        metadata = json.loads(_METADATA.value)
    except json.JSONDecodeError as e:
        raise ValueError(f"metadata must be JSON, got {_METADATA.value!r}: {e}") from e
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata must be a JSON object, got {_METADATA.value!r}")
    if _CONTEXT_LENGTH.value is not None:
        metadata["context_length"] = _CONTEXT_LENGTH.value
    return metadata


def _read(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of earlier runs."""
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
        for entry in entries:
            _ = entry["task"], entry["settings"], entry["results"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} holds no results of this program: give another --output") from e
    return entries


def _task_manager(names: Sequence[str], metadata: dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    folders: list[Any] = [OWN_TASKS, *_INCLUDE_PATH.value]
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise ValueError(f"include_path must name folders, got {', '.join(missing)}")
    for defaults in (False, True):  # the index of all tasks takes many seconds to build
        manager = TaskManager(
            include_path=folders, include_defaults=defaults, metadata=dict(metadata)
        )
        unknown = [name for name in names if name not in manager.task_index]
        if not unknown:
            return manager
    raise ValueError(f"unknown tasks: {', '.join(unknown)}")


def _task_file(entry: Any) -> str:
    """Returns a digest of a task file, independent of its folder."""
    text = json.dumps(entry.cfg, sort_keys=True, default=str)
    if entry.yaml_path is not None:
        text = text.replace(str(entry.yaml_path.parent), "")
    return hashlib.sha1(text.encode()).hexdigest()[:16]


def _fingerprint(model: Any, config: Any) -> str:
    """Returns a digest of a model and its parameters."""
    import jax
    import numpy as np
    from flax import nnx

    described = config.model.to_json(sort_keys=True) if config else repr(model.config)
    digest = hashlib.sha1(described.encode())
    for x in jax.tree.leaves(nnx.state(model)):
        digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()[:16]


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Formats all metrics, with the mean over each of the paper's sets that is complete."""
    lines = [f"{'task':<26} {'metric':<18} {'value':>10} {'stderr':>8} {'examples':>8}"]
    values: dict[tuple[str, str], float] = {}
    for entry in entries:
        for task, results in entry["results"].items():
            count = entry["n-samples"].get(task, {}).get("effective", "")
            for metric, value, error in _metrics(results):
                lines.append(f"{task:<26} {metric:<18} {value:>10.4f} {error:>8} {count:>8}")
                values[task, metric] = value
    for name, metrics in SETS.items():
        wanted = [(task, m) for task, m in metrics.items() if m and not m.endswith("perplexity")]
        if wanted and all(key in values for key in wanted):
            mean = sum(values[key] for key in wanted) / len(wanted)
            lines.append(f"{name:<26} {'mean':<18} {mean:>10.4f}")
    return "\n".join(lines)


def _metrics(results: dict[str, Any]) -> Iterator[tuple[str, float, str]]:
    """Yields the name, value and standard error of each metric; keys are ``metric,filter``."""
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = results.get(f"{metric}_stderr,{kind}")
            shown = f"{error:.4f}" if isinstance(error, float) else ""
            yield metric if kind == "none" else key, value, shown


if __name__ == "__main__":
    run(program)
