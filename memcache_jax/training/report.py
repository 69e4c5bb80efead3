"""What a run leaves behind when it ends: parameters, results, a curve and a sample."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memcache_jax.generation import generate
from memcache_jax.nn import LanguageModel
from memcache_jax.training.checkpoint import export_params
from memcache_jax.training.config import Config
from memcache_jax.training.distributed import is_main_process
from memcache_jax.training.metrics import plot_curve, read_metrics
from memcache_jax.training.step import Params
from memcache_jax.training.tokenizers import Tokenizer

RESULTS_FILE = "results.json"


def read_results(workdir: Path, step: int) -> dict[str, Any] | None:
    """Returns the results of the run that ended at ``step``, if it came to write them."""
    path = workdir / RESULTS_FILE
    results = json.loads(path.read_text()) if path.exists() else None
    return results if results and results["step"] == step else None


def write_report(
    workdir: Path,
    config: Config,
    graph: nnx.GraphDef,
    params: Params,
    tokenizer: Tokenizer,
    bytes_per_token: float,
    results: dict[str, Any],
) -> dict[str, Any]:
    """Writes ``params/``, ``loss.png``, ``sample.txt`` and, last, ``results.json``.

    A run of several processes has no sample.

    Args:
      workdir: the run's folder.
      config: its configuration.
      graph: the model without its arrays.
      params: the model's arrays.
      tokenizer: the run's tokenizer.
      bytes_per_token: of the held-out text.
      results: what was measured.

    Returns:
      The results, with the number of parameters and the sample added.
    """
    export_params(workdir, params)
    results |= {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "tokens": results["step"] * config.batch_size * config.sequence_length,
    }
    if not is_main_process():
        return results
    is_bytes = config.data.tokenizer == "bytes"
    plot_curve(
        workdir,
        title=f"{workdir.name}: {'-'.join(config.model.mixers)}, {config.model.num_layers} layers",
        bytes_per_token=bytes_per_token if is_bytes else None,
    )
    losses = [row["loss"] for row in read_metrics(workdir) if "loss" in row]
    results["train_loss"] = losses[-1] if losses else None
    # No process of several has all parameters.
    if config.sample.max_new_tokens and jax.process_count() == 1:
        began = time.monotonic()
        text = _sample(config, nnx.merge(graph, params), tokenizer)
        replace_file(workdir / "sample.txt", text + "\n")
        results |= {"sample": text, "sample_seconds": round(time.monotonic() - began, 1)}
    # Last, so that a run is complete where it exists.
    replace_file(workdir / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    return results


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one step, so that a kill leaves the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    new.replace(path)


def lock_workdir(workdir: Path, who: str = "run") -> TextIO:
    """Makes sure that no other process of this machine writes to the workdir.

    The lock goes with the file that is returned, or with the process, however it ends.

    Raises:
      ValueError: if another one holds it; ``who`` is what the message calls that.
    """
    file = (workdir / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another {who} is writing to {workdir}: wait for it, or give another --workdir"
        ) from None
    return file


def _sample(config: Config, model: LanguageModel, tokenizer: Tokenizer) -> str:
    prompt = tokenizer.encode(config.sample.prompt.encode())
    if not len(prompt):
        prompt = np.array([tokenizer.eos_id], np.int32)
    tokens = generate(
        model,
        jnp.asarray(prompt)[None],
        max_new_tokens=config.sample.max_new_tokens,
        temperature=config.sample.temperature,
        top_p=config.sample.top_p,
        stop_token=None,
        key=jax.random.key(config.seed),
    )
    return tokenizer.decode(np.asarray(tokens[0]).tolist())
