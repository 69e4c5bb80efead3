"""Our layers beside others': workers, rows, and what a program without the others says."""

import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.bench_peers import _environments, _rows, ours, tpu
from experiments.bench_peers._environments import NoEnvironmentError, environment, interpreter, pins
from experiments.bench_peers._jobs import Jobs
from experiments.bench_peers._worker import Worker, WorkerError

PAIR = _rows.Pair("a row", "ours", "peer", "theirs", "a note")


class Fake:
    """A worker that answers from a list, and records who was called."""

    def __init__(self, name, answers, calls):
        self.name, self.answers, self.calls = name, iter(answers), calls

    def call(self, function, *arguments, **named):
        self.calls.append((self.name, function))
        return next(self.answers)


def bench(*flags, **environ):
    command = [sys.executable, "-m", "experiments.bench_peers", *flags]
    around = {**os.environ, **environ}
    return subprocess.run(command, capture_output=True, text=True, env=around, check=False)


def test_a_worker_answers_and_raises_as_its_module_does():
    with Worker(sys.executable, "_environments", core=min(os.sched_getaffinity(0))) as worker:
        assert worker.call("pins", "torch") == pins("torch")
        with pytest.raises(WorkerError, match=r"FileNotFoundError: .*requirements-none"):
            worker.call("pins", "none")
        assert worker.call("pins", name="tpu") == pins("tpu")


def test_a_worker_that_ends_says_how():
    with Worker(sys.executable, "_environments") as worker:
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(WorkerError, match="_environments ended, status -9"):
            worker.call("pins", "torch")


def test_versions_are_pinned():
    assert pins("torch").keys() >= {pair.peer for pair in _rows.CPU}
    assert pins("tpu").keys() >= {pair.peer for pair in _rows.TPU} | {"jax", "libtpu"}
    assert pins("gpu").keys() >= {pair.peer for pair in _rows.GPU}


def test_jobs_are_run_once_before_they_are_timed():
    ran = []
    clock = iter([1.0, 3.5]).__next__
    jobs = Jobs({"a": lambda length: lambda: ran.append(length) or (1, length)}, clock)
    assert jobs.prepare("a", length=4) == [1, 4]
    assert jobs.seconds("a") == 2.5
    assert ran == [4, 4]


def test_times_are_medians_in_turn():
    calls = []
    first, second = (
        Fake(name, [[1, 4], *times], calls)
        for name, times in (("ours", [1.0, 2.0, 9.0]), ("peer", [8.0, 6.0, 7.0]))
    )
    assert _rows.timed(PAIR, first, second, rounds=3, length=4) == 3.5
    turns = [name for name, function in calls if function == "seconds"]
    assert turns == ["ours", "peer", "peer", "ours", "ours", "peer"]


def test_outputs_of_other_shapes_are_not_compared():
    first, second = Fake("ours", [[1, 4]], []), Fake("peer", [[1, 5]], [])
    with pytest.raises(ValueError, match=r"\[1, 4\] and \[1, 5\]"):
        _rows.timed(PAIR, first, second, rounds=1)


@pytest.mark.parametrize("loops", [0, 2])
def test_compiled_programs_as_ratios(loops):
    ours_has = dict(bytes=3, temporaries=5, seconds=1.0, loops=loops)
    peer_has = dict(bytes=6, temporaries=0, seconds=4.0, loops=0)
    found = _rows.compiled(PAIR, Fake("both", [ours_has, peer_has], []), "v6e", gradient=True)
    assert found[:3] == ["0.50", "-", "0.25"]
    assert found[3] == ("a note" + "; bytes count 2 loops of ours and 0 of its once" * (loops > 0))


def test_table():
    lines = list(_rows.table(("a", "b"), [["1", "2"]]))
    assert lines == ["| a | b |", "|---|---|", "| 1 | 2 |"]


def test_a_python_that_is_not_there():
    assert interpreter("3.11", "3.99") == sys.executable
    with pytest.raises(NoEnvironmentError, match=r"no Python from 3\.98 to 3\.99"):
        interpreter("3.98", "3.99")


def test_a_folder_of_something_else_stays_as_it_is(tmp_path):
    (tmp_path / "torch").mkdir()
    with pytest.raises(NoEnvironmentError, match="torch is there already"):
        environment("torch", tmp_path)


@pytest.mark.slow
def test_an_environment_is_made_once_for_its_requirements(tmp_path, monkeypatch):
    monkeypatch.setattr(_environments, "_HERE", tmp_path)
    requirements = tmp_path / "requirements-none.txt"
    requirements.write_text("# nothing\n")
    python = environment("none", tmp_path / "made")
    told = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True)
    assert told.stdout.decode().strip() == str(tmp_path / "made" / "none")
    made = []
    monkeypatch.setattr(_environments, "_run", made.append)
    assert environment("none", tmp_path / "made") == python
    assert not made
    requirements.write_text("# something\n")
    environment("none", tmp_path / "made")
    assert [command[1:3] for command in made] == [["-m", "venv"], ["-m", "pip"]]


def test_error_of_linear_memories(tmp_path):
    rng = np.random.default_rng(0)
    q, k, v, u = rng.standard_normal((4, 1, 6, 2, 3), dtype=np.float32)
    y = np.stack([memory_caching(*x, segment=4) for x in zip(*(q, k, v, u), strict=True)])
    path = str(tmp_path / "arrays.npz")
    np.savez(path, q=q, k=k, v=v, u=u, y=y)
    assert ours.error(path, segment=4) < 1e-6
    assert ours.error(path, segment=3) > 1e-2
    np.savez(path, q=q, k=k, v=v, u=u, y=y[:, :5])
    with pytest.raises(ValueError, match=r"the peer returns \(1, 5, 2, 3\)"):
        ours.error(path, segment=4)


def memory_caching(query, key, value, connector, segment):
    """Linear GRM of sums of keys, token by token."""
    outputs = np.zeros_like(value)
    for head in range(query.shape[1]):
        q, k, v, u = (x[:, head] for x in (query, key, value, connector))
        for t in range(len(q)):
            parts = [slice(i, min(i + segment, t + 1)) for i in range(0, t + 1, segment)]
            scores = np.exp([u[t] @ k[part].sum(0) for part in parts])
            reads = [(k[part] @ q[t]) @ v[part] for part in parts]
            outputs[t, head] = np.array(scores) / np.sum(scores) @ reads
    return outputs


@pytest.mark.parametrize("case", tpu.CASES)
def test_operands_of_rules(case):
    found = tpu.operands(case, length=2, heads=3, dim=4)
    channels = (4,) if "KDA" in case else ()
    assert found["log_alpha"].shape == (1, 2, 3, *channels)
    assert found["log_alpha"].max() < 0
    assert np.allclose(np.linalg.norm(found["key"], axis=-1), 1)
    assert {*found} == {*tpu.shapes(case, length=2, heads=3, dim=4)}


@pytest.mark.slow
def test_a_job_of_ours_runs():
    sizes = dict(length=8, features=8, heads=2, segment=4, chunk=2)
    assert ours.prepare("Titans", **sizes) == [1, 8, 8]
    assert ours.seconds("Titans") > 0


@pytest.mark.slow
def test_rows_without_their_library_say_so(tmp_path):
    assert "matches no row" in bench("--only=no such row").stderr
    assert "no NVIDIA GPU" in bench("--only=gpu:KDA", PATH="").stdout
    done = bench(
        *("--only=cpu:linear+GRM/", f"--folder={tmp_path}"), PIP_NO_INDEX="1", PIP_FIND_LINKS=""
    )
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1]
    assert row.startswith("| linear + GRM | memory-caching 0.1.0 | - | - | - | none: ERROR:")
