"""What a run tells: a file of metrics, TensorBoard, a progress line, the curve of its losses."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to ``workdir/metrics.jsonl``, one line per step, and to TensorBoard if asked.

    Args:
      workdir: the run's folder.
      step: the step that the run goes on from. Lines of later steps, which a run wrote after its
        last checkpoint, are dropped, as their steps come again; 0 starts an empty file.
      tensorboard: also write to ``workdir/tensorboard``.

    Raises:
      ImportError: if TensorBoard is asked for, but ``tensorboardX`` is not installed.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, step: int = 0, tensorboard: bool = False
    ) -> None:
        self._board = _tensorboard(Path(workdir) / "tensorboard", step) if tensorboard else None
        path = Path(workdir) / METRICS_FILE
        kept = [row for row in read_metrics(workdir) if row["step"] <= step] if step else []
        new = path.with_suffix(".new")
        new.write_text("".join(json.dumps(row) + "\n" for row in kept))
        new.replace(path)
        self._file = path.open("a")

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes one step's metrics, on disk when this returns."""
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
        raise ImportError(
            "tensorboard=True needs tensorboardX: pip install 'memcache_jax[tensorboard]'"
        ) from e
    return tensorboardX.SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of ``workdir/metrics.jsonl``, without one that a kill cut short."""
    path = Path(workdir) / METRICS_FILE
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Progress:
    """The progress line on stdout: ``step 120/600  loss 2.013  3.4k tok/s  1m40s left``.

    A terminal has one line that is rewritten, a file a line each time.

    Args:
      steps: the run's last step.
      tokens_per_step: tokens in a batch.
      step: the step that the run goes on from.
      show: False for a process that keeps silent.
    """

    def __init__(
        self, steps: int, tokens_per_step: int, step: int = 0, *, show: bool = True
    ) -> None:
        self._steps, self._tokens, self._show = steps, tokens_per_step, show
        self._rewrite = sys.stdout.isatty()
        self._open = False
        self._began: tuple[float, int] | None = None
        self._last = (time.monotonic(), step)

    def start(self, step: int) -> None:
        """Starts the clock, after the first step, which compiles."""
        self._began = self._last = (time.monotonic(), step)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Takes the time spent inside, such as an evaluation's, out of the tokens per second."""
        began = time.monotonic()
        yield
        at, step = self._last
        self._last = (at + time.monotonic() - began, step)

    def update(self, step: int, loss: float) -> float:
        """Shows the line, and returns the tokens per second since the last one."""
        now = time.monotonic()
        at, before = self._last
        rate = (step - before) * self._tokens / max(now - at, 1e-9)
        self._last = (now, step)
        left = ""
        if self._began is not None and step > self._began[1]:
            # Of the whole run so far, so that evaluations count.
            per_step = (now - self._began[0]) / (step - self._began[1])
            left = f"  {_duration(per_step * (self._steps - step))} left"
        line = f"step {step}/{self._steps}  loss {loss:.3f}  {_short(rate)} tok/s{left}"
        if not self._show:
            return rate
        if self._rewrite:
            print(f"\r{line:<60}", end="", flush=True)
            self._open = True
        else:
            print(line, flush=True)
        return rate

    def note(self, text: str) -> None:
        """Writes a line of its own."""
        if self._show:
            print(("\n" if self._open else "") + text, flush=True)
        self._open = False


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _duration(seconds: int | float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def plot_curve(
    workdir: str | os.PathLike[str], *, title: str, bytes_per_token: float | None = None
) -> Path:
    """Draws ``workdir/loss.png`` from the metrics: the training loss, and held-out points.

    Args:
      workdir: the run's folder.
      title: above the axes.
      bytes_per_token: if given, losses are in bits per byte, otherwise in nats per token.
    """
    # Not at the top: it takes a second, and the caller may never draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scale = 1.0 if bytes_per_token is None else 1 / (math.log(2) * bytes_per_token)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = read_metrics(workdir)
    for name, label, style in (("loss", "training", "-"), ("heldout_loss", "held-out", "o--")):
        points = [(row["step"], row[name] * scale) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token" if bytes_per_token is None else "bits per byte")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure)
    path = Path(workdir) / "loss.png"
    figure.savefig(path, dpi=120)
    return path
