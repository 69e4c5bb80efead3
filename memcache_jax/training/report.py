"""The report of a finished run: parameters, results, a loss curve and a sample."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memcache_jax.generation import generate
from memcache_jax.generation.prompts import longest
from memcache_jax.nn import LanguageModel
from memcache_jax.training.config import Config
from memcache_jax.training.distributed import is_main_process
from memcache_jax.training.durable import replace_file
from memcache_jax.training.export import RESULTS_FILE, export_params
from memcache_jax.training.metrics import plot_curve, read_metrics
from memcache_jax.training.step import Params
from memcache_jax.training.tokenizers import Tokenizer


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

    A run of several processes writes no sample. Returns the results with the numbers of parameters
    and tokens, the last loss and the sample added.
    """
    export_params(workdir, params)
    results |= {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "tokens": results["step"] * config.batch_size * config.sequence_length,
    }
    if not is_main_process():
        return results
    is_bytes = config.data.tokenizer == "bytes"
    what = "-".join(config.model.mixers)
    if config.pretrained is not None:
        what = Path(config.pretrained).name
    plot_curve(
        workdir,
        title=f"{workdir.name}: {what}, {config.model.num_layers} layers",
        bytes_per_token=bytes_per_token if is_bytes else None,
    )
    losses = [row["loss"] for row in read_metrics(workdir) if "loss" in row]
    results["train_loss"] = losses[-1] if losses else None
    # Each of several processes has only a part of the parameters.
    if config.sample.max_new_tokens and jax.process_count() == 1:
        began = time.monotonic()
        text = sample(config, nnx.merge(graph, params), tokenizer)
        replace_file(workdir / "sample.txt", text + "\n")
        results |= {"sample": text, "sample_seconds": round(time.monotonic() - began, 1)}
    # Last, since this file marks a run as complete.
    replace_file(workdir / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    return results


def sample(config: Config, model: LanguageModel, tokenizer: Tokenizer) -> str:
    """Returns a text of the model, as ``config.sample`` asks for it."""
    prompt = tokenizer.encode(config.sample.prompt.encode())
    if not len(prompt):
        prompt = np.array([tokenizer.eos_id], np.int32)
    count, most = config.sample.max_new_tokens, longest(model)
    if most is not None:  # as many as there is room for; the last one is drawn, but not read
        prompt = prompt[:most]
        count = min(count, most - len(prompt) + 1)
    tokens = generate(
        model,
        jnp.asarray(prompt)[None],
        max_new_tokens=count,
        temperature=config.sample.temperature,
        top_p=config.sample.top_p,
        stop_token=None,
        key=jax.random.key(config.seed),
    )
    return tokenizer.decode(np.asarray(tokens[0]).tolist())
