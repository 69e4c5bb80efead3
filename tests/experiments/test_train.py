"""The command line, in processes of its own, as a person runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

REPOSITORY = Path(__file__).parents[2]

CONFIG = """
from memcache_jax.training import default_config

def get_config():
    config = default_config()
    config.steps, config.batch_size, config.sequence_length = 40, 2, 32
    config.log_every, config.eval_every, config.checkpoint_every = 1, 20, 10
    config.model.update(num_layers=1, features=16, num_heads=1, mlp_features=16)
    config.model.memory.update(chunk_size=8, expansion=1)
    config.model.segmentation.size = 16
    config.data.files = ({corpus!r},)
    config.data.heldout_fraction = 0.2
    config.data.heldout_tokens = 128
    config.optimizer.warmup_steps = 2
    config.sample.max_new_tokens = 4
    config.sample.prompt = "3 app"
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, a configuration, and compiled programs that all runs share."""
    folder = tmp_path_factory.mktemp("command_line")
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(12):
        (corpus / f"{i}.txt").write_text(f"{i} apples and {i} pears are {2 * i} fruits. " * (9 + i))
    (folder / "config.py").write_text(CONFIG.format(corpus=str(corpus)))
    return folder


@pytest.fixture
def start(folder):
    """Starts the program; what still runs at the end is killed."""
    running = []

    def start(workdir, *flags):
        command = [sys.executable, "-m", "experiments.train"]
        command += [f"--config={folder / 'config.py'}", f"--workdir={workdir}", *flags]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compilations"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def run(start):
    """Runs the program to its end."""

    def run(*arguments):
        process = start(*arguments)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "tokens_per_second": 0} for line in lines]


def wait_for_step(process, step):
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    pytest.fail(f"the run ended before step {step}: {process.stderr.read()}")


@pytest.mark.slow
def test_killed_and_resumed_equals_a_whole_run(folder, start, run):
    whole, parts = folder / "whole", folder / "parts"
    code, out, err = run(whole)
    assert code == 0, err
    assert "held-out bits/byte" in out
    assert "Sample:\n3 app" in out
    assert f"python -m experiments.generate --workdir={whole}" in out
    assert f"--workdir={whole} --config.resume=True --config.steps=80\n" in out
    assert f"{folder / 'config.py'} --config.data.files=FOLDER --workdir=runs/mine\n" in out
    assert len(rows(whole)) == 40

    process = start(parts)
    wait_for_step(process, 20)
    while not (parts / "checkpoints" / "20").is_dir():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (parts / "params").exists()

    code, out, err = run(parts, "--config.resume=True")
    assert code == 0, err
    assert "Resuming from the checkpoint of step" in out
    assert rows(parts) == rows(whole)
    first, second = ocp.load(whole / "params"), ocp.load(parts / "params")
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert (parts / "sample.txt").read_text() == (whole / "sample.txt").read_text()


@pytest.mark.slow
def test_control_c_saves_and_says_how_to_go_on(folder, start):
    process = start(folder / "interrupted", "--config.steps=100000")
    wait_for_step(process, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped after step" in out
    assert "--config.resume=True resumes from there" in out
    assert "Traceback" not in err
    (step,) = (int(path.name) for path in (folder / "interrupted" / "checkpoints").iterdir())
    assert step == rows(folder / "interrupted")[-1]["step"]


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_says_why(folder, start):
    # A file-size limit fails the writes of the checkpoint's arrays, as a full disk does.
    limited = folder / "limited.py"
    limited.write_text(
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        + (folder / "config.py").read_text()
    )
    process = start(folder / "full", f"--config={limited}")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: could not save the checkpoint of step 10" in err
    assert "File too large" in err
    assert "There is no earlier one" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.nope=3", "nope"),
        ("--config.steps=many", "config.steps"),
        ("--config.model.memory={'name': 'Titan'}", "model.memory.name must be one of"),
        ("--config.data.files=/nowhere", "expected a folder, a file or a glob, got '/nowhere'"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, run, flag, message):
    code, _, err = run(folder / "mistaken", flag)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert not (folder / "mistaken").exists()
