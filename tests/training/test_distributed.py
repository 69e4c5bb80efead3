"""Several processes in one run, and meshes under the training loop."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from memcache_jax.training import train
from memcache_jax.training.checkpoint import Checkpoints
from memcache_jax.training.config import to_json
from memcache_jax.training.distributed import initialize
from memcache_jax.training.metrics import read_metrics

# A process of a run: joins the others, tells which streams of data it makes, and dies before a
# step where it is told to.
PROCESS = """
import json, os, sys, time
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
from ml_collections import ConfigDict
from memcache_jax.training import initialize, loop, streams, train
initialize()
config, death = ConfigDict(json.loads(sys.argv[1])), int(sys.argv[4])
make = loop.make_train_step
def make_mortal(*args):
    step, calls = make(*args), []
    def mortal(*arguments):
        calls.append(1)
        if len(calls) == death:
            while not os.path.isdir(sys.argv[2] + "/checkpoints/2"):
                time.sleep(0.1)
            os._exit(9)
        return step(*arguments)
    return mortal
loop.make_train_step = make_mortal
make_iterator = streams.training_iterator
def make_told(*args, **options):
    print("reads stream", options["stream_index"], file=sys.stderr)
    return make_iterator(*args, **options)
streams.training_iterator = make_told
train(config, sys.argv[2])
"""


@pytest.fixture
def config(config):
    config.steps, config.batch_size = 4, 4
    config.log_every, config.eval_every, config.checkpoint_every = 1, 4, 2
    config.resume = True
    return config


def start(config, workdir, cache, processes, death=0):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config.mesh.data = processes
    command = [sys.executable, "-c", PROCESS, json.dumps(to_json(config)), workdir, cache, death]
    return [
        subprocess.Popen(
            list(map(str, command)),
            env={
                **os.environ,
                "XLA_FLAGS": "",
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish(processes):
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return errors


def losses(workdir):
    return [(row["step"], row["loss"]) for row in read_metrics(workdir)]


@pytest.mark.slow
def test_two_processes_die_and_go_on_as_one_and_as_two(config, tmp_path, compilation_folder):
    cache, config.data.streams = compilation_folder, 2
    train(config, tmp_path / "whole")
    wanted = losses(tmp_path / "whole")
    for process in start(config, tmp_path / "two", cache, 2, death=4):
        process.communicate(timeout=240)
    assert Checkpoints.steps_in(tmp_path / "two") == [2]
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    told = finish(start(config, tmp_path / "two", cache, 2))
    for index, lines in enumerate(told):
        assert re.findall(r"reads stream (\d)", lines) == [str(index)]
    np.testing.assert_allclose(losses(tmp_path / "two"), wanted, rtol=1e-5)
    config.mesh.data = 1
    train(config, tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "one"), wanted, rtol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_with_a_checkpoint(
    config, tmp_path, compilation_folder
):
    config.steps, config.checkpoint_every, config.eval_every = 100_000, 50_000, 50_000
    processes = start(config, tmp_path / "run", compilation_folder, 2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.5)
    processes[1].send_signal(signal.SIGTERM)
    try:
        errors = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("StoppedError" in error for error in errors), errors
    (saved,) = Checkpoints.steps_in(tmp_path / "run")
    assert losses(tmp_path / "run")[-1][0] <= saved


@pytest.mark.slow
def test_a_mesh_trains_as_one_device_does(config, tmp_path):
    train(config, tmp_path / "one")
    config.mesh.update(data=2, fsdp=2, seq=2, tensor=1)
    with pytest.raises(ValueError, match="does not fill"):
        train(ConfigDict({**config, "mesh": {**config.mesh, "data": 3}}), tmp_path / "none")
    train(config, tmp_path / "mesh")
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "one"), rtol=1e-5)


def test_the_batch_must_fit_the_mesh(config, tmp_path):
    config.mesh.fsdp = -1
    with pytest.raises(ValueError, match=r"multiple of mesh.data \* mesh.fsdp .* = 8, got 4"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(JAX_NUM_PROCESSES="2"), "not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        (
            dict(JAX_COORDINATOR_ADDRESS="h:1", JAX_NUM_PROCESSES="two", JAX_PROCESS_ID="0"),
            "must be numbers",
        ),
    ],
)
def test_half_an_environment_is_refused(variables, message):
    with pytest.raises(ValueError, match=message):
        initialize(variables)


def test_no_environment_is_one_process():
    initialize({"TPU_WORKER_HOSTNAMES": "localhost"})
    assert jax.process_count() == 1
