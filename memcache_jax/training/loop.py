"""The training loop: data, steps, metrics, checkpoints, and resuming a stopped run."""

import contextlib
import json
import logging
import math
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from memcache_jax._checks import check_path
from memcache_jax.sharding import AXES, make_mesh
from memcache_jax.training.checkpoint import Checkpoints
from memcache_jax.training.config import Config, check_config, to_json, with_choices_made
from memcache_jax.training.corpus import ReadingTroubles, load_corpus
from memcache_jax.training.distributed import (
    all_agree,
    check_agreement,
    is_main_process,
    place_rows,
    should_stop,
    wait_for_all,
)
from memcache_jax.training.documents import separator
from memcache_jax.training.durable import replace_file
from memcache_jax.training.export import TOKENIZER_FILE, read_results
from memcache_jax.training.metrics import MetricsWriter, Progress, read_metrics
from memcache_jax.training.optimizer import make_optimizer, make_schedule
from memcache_jax.training.pretrained import FILE, PublicModel, begin, merged, run_model
from memcache_jax.training.report import sample, write_report
from memcache_jax.training.signals import StoppedError, StopSignal
from memcache_jax.training.step import (
    abstract_state,
    create_state,
    evaluate,
    make_eval_step,
    make_train_step,
)
from memcache_jax.training.streams import Streams, streams_here
from memcache_jax.training.workdir import check_same_run, check_workdir, lock_run

_log = logging.getLogger(__name__)


def train(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains the language model that ``config`` describes and returns the final results.

    The workdir then holds ``config.json``, ``metrics.jsonl``, ``checkpoints/``, the parameters
    alone in ``params/``, ``results.json``, ``loss.png``, ``sample.txt`` and, if the tokenizer is a
    file, a copy of it; if it began with a public model, ``pretrained.json``. A line of metrics has
    the means of ``loss``, ``z_loss`` and ``gradient_norm`` since the previous line, and
    ``heldout_*`` after an evaluation. A resumed run writes the same numbers as one that was never
    stopped (on a GPU, with ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``). A running run holds
    ``.lock``.

    Args:
      config: as from ``default_config``.
      workdir: the run's folder; created if it does not exist.

    Returns:
      The held-out loss in nats per token, bits per byte and perplexity, and the run's size.

    Raises:
      ValueError: for an invalid configuration or data, or a workdir that holds another run.
      FloatingPointError: if the loss or the gradient becomes infinite or NaN.
      CheckpointError: if a checkpoint cannot be written.
      StoppedError: after SIGINT or SIGTERM and a checkpoint of the last step. Runs of several
        processes stop on SIGTERM only.
    """
    check_config(config)
    workdir = Path(os.path.abspath(check_path("workdir", workdir)))
    mesh = config_mesh(config)
    with (
        contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh),
        contextlib.closing(_Run(config, workdir, mesh)) as run,
    ):
        run.restore()
        if run.step >= config.steps and (results := read_results(run.workdir, run.step)):
            _log.info("The run in %s is complete, at step %d.", run.workdir, run.step)
            return results
        if run.step < config.steps:
            with StopSignal() as stop:
                run.train(stop)
        return run.finish()


def config_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh | None:
    """Returns the mesh of a configuration; None for a single device.

    Raises:
      ValueError: if the sizes do not fit the devices, or do not divide the batch.
    """
    sizes = {axis: config.mesh[axis] for axis in AXES}
    if set(sizes.values()) == {1} and devices is None and jax.process_count() == 1:
        return None
    mesh = make_mesh(sizes, slices=config.mesh.slices, devices=devices)
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of mesh.data * mesh.fsdp * accumulate = {parts}, "
            f"got {config.batch_size}"
        )
    return mesh


class _Run:
    """A run after ``step`` updates."""

    def __init__(self, config: Config, workdir: Path, mesh: Mesh | None) -> None:
        self.workdir, self.mesh = workdir, mesh
        config = with_choices_made(config, Checkpoints.notes_in(workdir))
        self.public = public = PublicModel.of(config)
        config = self.config = config if public is None else public.resolved(config)
        model = run_model(config, public)
        device = jax.local_devices()[0]
        memories = sorted(memory.kind for memory in device.addressable_memories())
        if model.offload_states and "pinned_host" not in memories:
            raise ValueError(
                f"model.offload_states needs devices that see the host's memory (pinned_host), got "
                f"{device.platform} with {', '.join(memories)}"
            )
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        frozen = frozenset() if public is None else public.frozen(config)
        self.graph, target = abstract_state(model, self.optimizer, mesh, frozen)
        self.corpus = load_corpus(config)
        self.troubles = ReadingTroubles(self.corpus)
        self.batches = Streams(
            self.corpus.train,
            self.corpus.tokenizer,
            sequence_length=config.sequence_length,
            batch_size=config.batch_size,
            seed=config.seed,
            num_streams=config.data.streams,
            read=streams_here(mesh, config.batch_size, config.data.streams),
        )
        if public is None:
            placed = None if mesh is None else target
            self.create = lambda: create_state(model, self.optimizer, config.seed, placed)
        else:
            self.create = lambda: begin(public, config, self.optimizer, target, mesh)
        self.target = target
        # Checked before anything in the workdir changes.
        found = check_workdir(workdir, resume=config.resume)
        end_token = self.corpus.tokenizer.eos_id
        self.end_token = separator(config, end_token, self.graph, target.whole)
        self.eval_step = make_eval_step(self.graph, self.end_token, config.accumulate)
        facts = config, public, self.corpus.identity, found
        check_agreement("configuration, public model, data, or workdir", *facts)
        workdir.mkdir(parents=True, exist_ok=True)
        self._lock = lock_run(workdir)
        self.checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
        self.metrics: MetricsWriter | None = None
        self.step = 0
        self.since_line: list[dict[str, float]] = []  # metrics of the steps since the last line
        self.on_device: list[dict[str, jax.Array]] = []  # of later steps, not fetched yet

    def restore(self) -> None:
        """Restores the newest checkpoint, or creates the initial state."""
        notes = Checkpoints.notes_in(self.workdir)
        if notes is not None:
            check_same_run(self.workdir, notes, self.config, self.corpus.identity)
            if self.public is not None:
                self.public.check_same(PublicModel.of_run(self.workdir), self.workdir)
        restored = self.checkpoints.restore(self.target, self.batches)
        if restored is None:
            self.state = self.create()
        else:
            self.step, self.state, notes = restored
            if self.target.frozen and self.public is not None:
                frozen = self.public.parameters(self.config)
                self.state = self.state._replace(frozen=frozen)
            self.since_line = list(notes["since_line"])
            _log.info("Resuming from the checkpoint of step %d.", self.step)
        if self.step < self.config.steps:
            _log.info("Compiling; training begins after that. Ctrl-C stops it with a checkpoint.")
        if not is_main_process():
            return
        replace_file(
            self.workdir / "config.json", json.dumps(to_json(self.config), indent=2) + "\n"
        )
        if self.public is not None:
            text = json.dumps(self.public._asdict(), indent=2) + "\n"
            replace_file(self.workdir / FILE, text)
        if self.config.data.tokenizer != "bytes":
            shutil.copyfile(self.config.data.tokenizer, self.workdir / TOKENIZER_FILE)
        self.metrics = MetricsWriter(
            self.workdir, step=self.step, tensorboard=self.config.tensorboard
        )

    def train(self, stop: StopSignal) -> None:
        """Makes the remaining updates.

        Raises:
          FloatingPointError, CheckpointError, StoppedError: as ``train``.
        """
        config = self.config
        train_step = make_train_step(
            *(self.graph, self.optimizer, config.optimizer.z_loss, config.accumulate),
            *(self.target, self.end_token),
        )
        schedule = make_schedule(config.optimizer, config.steps)
        size = config.batch_size * config.sequence_length
        progress = Progress(config.steps, size, self.step, show=is_main_process())
        first = self.step + 1
        saved = self.step if self.checkpoints.steps else None
        with contextlib.closing(progress):
            while self.step < config.steps and not should_stop(self.step, stop.number):
                tokens = place_rows(next(self.batches), self.mesh)
                self.state, metrics = train_step(self.state, tokens)
                self.step += 1
                # The host prepares one step ahead of the device. If it ran further ahead, a signal
                # would have to wait for all those steps.
                jax.block_until_ready(metrics if self.step == first else self.on_device[-1:])
                self.on_device.append(metrics)
                if self.step == first:
                    progress.start(self.step)
                last = self.step == config.steps
                row: dict[str, float] = {}
                if last or self.step % config.log_every == 0:
                    self._fetch()
                    row = _means(self.since_line)
                    self.since_line = []
                    row["learning_rate"] = float(schedule(self.step - 1))
                    row["tokens_per_second"] = round(progress.update(self.step, row["loss"]), 1)
                    self.checkpoints.wait(only_if_done=True)
                with progress.pause():
                    if last:
                        progress.note("Evaluating ...")
                    if last or self.step % config.eval_every == 0:
                        row |= self._evaluate()
                        progress.note(
                            f"step {self.step}/{config.steps}  held-out: "
                            f"{row['heldout_bits_per_byte']:.3f} bits per byte, "
                            f"perplexity {row['heldout_perplexity']:.2f} per token"
                        )
                        self.troubles.tell()
                    if not last and self._samples_now():
                        text = self._sample()
                        progress.note(f"step {self.step}/{config.steps}  sample:\n{text}\n")
                    if row and self.metrics is not None:
                        self.metrics.write(self.step, row)
                    # After the metrics: a run that resumes here does not write this line again.
                    if last or self.step % config.checkpoint_every == 0:
                        self._save()
                        saved = self.step
        if saved != self.step:  # a signal can come at any line of the loop
            self._save()
        self.checkpoints.wait()
        if self.step < config.steps:
            raise StoppedError(self.step, stop.number or signal.SIGTERM, config.resume)

    def _fetch(self) -> None:
        """Fetches the metrics of the last steps from the device."""
        fetched = jax.device_get(self.on_device)
        for step, metrics in enumerate(fetched, start=self.step - len(fetched) + 1):
            metrics = {name: float(value) for name, value in metrics.items()}
            if not all(map(math.isfinite, metrics.values())):
                good = self.checkpoints.steps
                raise FloatingPointError(
                    f"step {step} is no longer finite: {metrics}. "
                    + (f"The checkpoint of step {good[0]} is good. " if good else "")
                    + "Try a lower optimizer.learning_rate, or optimizer.z_loss=1e-4, "
                    "in another --workdir"
                )
            self.since_line.append(metrics)
        self.on_device = []

    def _save(self) -> None:
        self._fetch()  # raises before a state with NaN is saved
        notes = {
            "config": to_json(self.config),
            "data": self.corpus.identity,
            "since_line": self.since_line,
        }
        self.checkpoints.save(self.step, self.state, self.batches, notes)
        if self.config.get("wait_for_checkpoints", True):
            self.checkpoints.wait(for_digests=False)

    def _samples_now(self) -> bool:
        """Whether the run prints a sample here; one of several processes has not all parameters."""
        wanted = self.config.sample
        every = wanted.get("every", 0) if wanted.max_new_tokens else 0
        return bool(every) and self.step % every == 0 and jax.process_count() == 1

    def _sample(self) -> str:
        model = nnx.merge(*merged(self.graph, self.state.whole))
        return sample(self.config, model, self.corpus.tokenizer)

    def _evaluate(self) -> dict[str, float]:
        return evaluate(
            self.eval_step,
            self.state.whole,
            self.corpus.heldout,
            self.config.batch_size,
            self.mesh,
        )

    def finish(self) -> dict[str, Any]:
        """Writes the report of a finished run, and returns the results."""
        wait_for_all("the last line of metrics")
        rows = [row for row in read_metrics(self.workdir) if row["step"] == self.step]
        measured = {k: v for row in rows for k, v in row.items() if k.startswith("heldout_")}
        if not all_agree(bool(measured)):  # another host may not see the last line yet
            measured = {}
        results = {"step": self.step, **(measured or self._evaluate())}
        return write_report(
            self.workdir,
            self.config,
            *merged(self.graph, self.state.whole, delete=True),  # which uses the state up
            self.corpus.tokenizer,
            self.corpus.heldout.bytes_per_token,
            results,
        )

    def close(self) -> None:
        """Waits for a save in progress, and closes the files."""
        with contextlib.ExitStack() as closing:
            closing.enter_context(self._lock)
            closing.callback(self.checkpoints.close)
            if self.metrics is not None:
                closing.callback(self.metrics.close)


def _means(metrics: list[dict[str, float]]) -> dict[str, float]:
    return {name: math.fsum(m[name] for m in metrics) / len(metrics) for name in metrics[0]}
