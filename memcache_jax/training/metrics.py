"""The metrics of a run: a file, TensorBoard, a progress line and a plot of the losses."""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from memcache_jax.training.durable import replace_file
from memcache_jax.training.pictures import new_figure

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to ``workdir/metrics.jsonl``, one line per step, and to TensorBoard if asked.

    Args:
      workdir: the run's folder.
      step: the step that the run resumes from. Lines of later steps, written after the last
        checkpoint, are dropped, since the run repeats those steps; 0 starts an empty file.
      tensorboard: also write to ``workdir/tensorboard``.

    Raises:
      ImportError: if ``tensorboard`` is set, but ``tensorboardX`` is not installed.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, step: int = 0, tensorboard: bool = False
    ) -> None:
        self._board = _tensorboard(Path(workdir) / "tensorboard", step) if tensorboard else None
        path = Path(workdir) / METRICS_FILE
        kept = [row for row in read_metrics(workdir) if row["step"] <= step] if step else []
        replace_file(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes one step's metrics; they are on disk when this returns."""
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        import tensorboardX
    except ImportError as e:
        raise ImportError("tensorboard=True needs tensorboardX: pip install tensorboardX") from e
    return tensorboardX.SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of ``workdir/metrics.jsonl``, without a last one that a kill cut short."""
    path = Path(workdir) / METRICS_FILE
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Progress:
    """The progress line on stdout: ``step 120/600  loss 2.013  3.41k tok/s  09:36 left``.

    A terminal shows one line that is rewritten; other output gets a new line for each update.

    Args:
      steps: the run's last step.
      tokens_per_step: tokens in a batch.
      step: the step that the run resumes from.
      show: whether this process prints anything.
    """

    def __init__(
        self, steps: int, tokens_per_step: int, step: int = 0, *, show: bool = True
    ) -> None:
        self._tokens = tokens_per_step
        self._terminal = sys.stdout.isatty()
        self._last = (time.monotonic(), step)
        self._bar = tqdm(
            initial=step,
            total=steps,
            disable=not show,
            file=sys.stdout if self._terminal else io.StringIO(),  # tqdm only rewrites lines
            nrows=20,  # pseudo-terminals can report 0, where tqdm shows nothing
            smoothing=0,  # time left by the mean of the whole run, so that evaluations count
            bar_format="step {n}/{total}{desc}  {remaining} left",
        )

    def start(self, step: int) -> None:
        """Starts the clock, after the first step, which compiles."""
        self._last = (time.monotonic(), step)
        self._bar.initial = step
        self._bar.unpause()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time spent inside, such as an evaluation's, out of the tokens per second."""
        began = time.monotonic()
        yield
        at, step = self._last
        self._last = (at + time.monotonic() - began, step)

    def update(self, step: int, loss: float) -> float:
        """Shows the line, and returns the tokens per second since the previous one."""
        now = time.monotonic()
        at, before = self._last
        rate = (step - before) * self._tokens / max(now - at, 1e-9)
        self._last = (now, step)
        self._bar.n = step
        text = f"  loss {loss:.3f}  {tqdm.format_sizeof(rate)} tok/s"
        self._bar.set_description_str(text, refresh=self._terminal)
        if not self._terminal:
            self.note(str(self._bar))
        return rate

    def note(self, text: str) -> None:
        """Writes a line of its own."""
        if not self._bar.disable:
            with tqdm.external_write_mode():
                print(text, flush=True)

    def close(self) -> None:
        """Ends the line."""
        self._bar.close()


def plot_curve(
    workdir: str | os.PathLike[str], *, title: str, bytes_per_token: float | None = None
) -> Path:
    """Plots the training loss and the held-out losses of a run to ``workdir/loss.png``.

    With ``bytes_per_token`` losses are in bits per byte, otherwise in nats per token.
    """
    scale = 1.0 if bytes_per_token is None else 1 / (math.log(2) * bytes_per_token)
    figure, ((axes,),) = new_figure(1, size=(7, 4.5))
    rows = read_metrics(workdir)
    for name, label, marker in (("loss", "training", ""), ("heldout_loss", "held-out", "s")):
        points = [(row["step"], row[name] * scale) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token" if bytes_per_token is None else "bits per byte")
    axes.set_title(title)
    axes.legend()
    path = Path(workdir) / "loss.png"
    figure.savefig(path, dpi=120)
    return path
