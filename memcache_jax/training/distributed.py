"""Runs of several processes: startup, agreement, and the rows that each process holds."""

import glob
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from memcache_jax._typing import Array
from memcache_jax.sharding import batch_sharding

_NAMED = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of the run, if the environment announces any.

    It does so by ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``. TPU hosts, Slurm job steps of several tasks, and Open MPI need none of
    these. Call it before any code asks for a device.

    Args:
      environment: the environment variables.

    Raises:
      ValueError: if only some of the three variables are set, or the last two are not numbers.
    """
    given = [name for name in _NAMED if environment.get(name)]
    if given and len(given) < len(_NAMED):
        missing = ", ".join(sorted(set(_NAMED) - set(given)))
        raise ValueError(f"{', '.join(given)} set, but not {missing}: set all of them or none")
    if given:
        address, *numbers = (environment[name] for name in _NAMED)
        if not all(number.isdecimal() for number in numbers):
            raise ValueError(f"{' and '.join(_NAMED[1:])} must be numbers, got {numbers}")
        count, index = map(int, numbers)
        jax.distributed.initialize(address, count, index)
    elif _is_tpu_host(environment) or _has_peers(environment):
        jax.distributed.initialize()


def _is_tpu_host(environment: Mapping[str, str]) -> bool:
    """Whether this host has TPUs that JAX may use; JAX then finds the other hosts of the slice."""
    platforms = environment.get("JAX_PLATFORMS", "tpu")
    return "tpu" in platforms and any(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))


def _has_peers(environment: Mapping[str, str]) -> bool:
    """Whether Slurm or Open MPI has started several processes."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    counts = (environment.get(name, "1") for name in names)
    return any(count.isdecimal() and int(count) > 1 for count in counts)


def is_main_process() -> bool:
    """Whether this process writes the files that a run writes once."""
    return jax.process_index() == 0


def place_rows(rows: np.ndarray, mesh: Mesh | None) -> Array:
    """Places each row on its devices.

    Every process passes all rows; those that its devices do not hold may have any values.
    """
    if mesh is None:
        return jnp.asarray(rows)
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda i: rows[i])


def should_stop(step: int, signal_number: int) -> bool:
    """Whether to stop after this step; the same in all processes.

    A single process stops on its own signal. With several, a SIGTERM to any of them reaches JAX's
    coordinator, which picks a step that all of them will reach.
    """
    if jax.process_count() == 1:
        return bool(signal_number)
    return multihost_utils.reached_preemption_sync_point(step)


def check_agreement(what: str, *facts: Any) -> None:
    """Raises ValueError unless the ``repr`` of the facts is the same in all processes."""
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    if len(set(gather(digest))) > 1:
        raise ValueError(f"the processes of this run have different values of {what}")


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order, after a round trip through JSON."""
    text = json.dumps(value).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    # Padded to multiples of 4096, because JAX compiles a program for each length.
    padded = np.zeros(-(-sizes.max() // 4096) * 4096, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    every = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def whole_arrays(tree: Any) -> Any:
    """Returns the arrays of a tree as NumPy arrays, whole in every process."""

    def whole(x: Array) -> np.ndarray:
        # One at a time: each is for a moment on every device.
        return np.asarray(
            x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
        )

    return jax.tree.map(whole, tree)


def all_agree(good: bool) -> bool:
    """Whether ``good`` is true in every process."""
    return all(gather(good))


def wait_for_all(what: str) -> None:
    """Waits until every process reaches this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
