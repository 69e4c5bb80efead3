"""Several processes in one run: how they find each other, and what each of them does."""

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
    """Joins the other processes of the run, if the environment says that there are any.

    That is so with ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``; and, with no need for those, on TPU hosts, in Slurm job steps of several
    tasks, and under Open MPI. Must come before anything asks for a device.

    Args:
      environment: the variables.

    Raises:
      ValueError: if only some of the three variables are set, or numbers are none.
    """
    given = [name for name in _NAMED if environment.get(name)]
    if given and len(given) < len(_NAMED):
        missing = ", ".join(sorted(set(_NAMED) - set(given)))
        raise ValueError(f"{', '.join(given)} set, but not {missing}: a run needs all or none")
    if given:
        address, *numbers = (environment[name] for name in _NAMED)
        if not all(number.isdecimal() for number in numbers):
            raise ValueError(f"{' and '.join(_NAMED[1:])} must be numbers, got {numbers}")
        count, index = map(int, numbers)
        jax.distributed.initialize(address, count, index)
    elif _is_tpu_host(environment) or _has_peers(environment):
        jax.distributed.initialize()


def _is_tpu_host(environment: Mapping[str, str]) -> bool:
    """Whether there is a TPU, whose slice JAX then asks for the other hosts, and it may be used."""
    platforms = environment.get("JAX_PLATFORMS", "tpu")
    return "tpu" in platforms and any(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))


def _has_peers(environment: Mapping[str, str]) -> bool:
    """Whether Slurm or Open MPI has started several processes."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    counts = (environment.get(name, "1") for name in names)
    return any(count.isdecimal() and int(count) > 1 for count in counts)


def is_main_process() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def place_rows(rows: np.ndarray, mesh: Mesh | None) -> Array:
    """Puts rows on the devices of a mesh, each its own.

    Every process has all rows, but may have anything in those that its devices do not hold.
    """
    if mesh is None:
        return jnp.asarray(rows)
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda i: rows[i])


def should_stop(step: int, signal_number: int) -> bool:
    """Whether to end after this step, the same for all processes.

    One process stops on its own signal. Of several, JAX's coordinator is told of a SIGTERM that any
    of them gets, and names a step that all of them will reach.
    """
    if jax.process_count() == 1:
        return bool(signal_number)
    return multihost_utils.reached_preemption_sync_point(step)


def check_agreement(what: str, *facts: Any) -> None:
    """Raises ValueError unless all processes have the same facts, as their texts say."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(repr(facts).encode()).digest(), np.uint8)
    every = multihost_utils.process_allgather(digest)
    if (every != every[:1]).any():
        raise ValueError(f"the processes of this run differ in {what}")


def gather(value: Any) -> list[Any]:
    """Returns what each process has, in their order, as it comes back from JSON."""
    text = json.dumps(value).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    # In steps, as each length is a program to compile.
    padded = np.zeros(-(-sizes.max() // 4096) * 4096, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    every = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def all_agree(good: bool) -> bool:
    """Whether this is true in every process."""
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def wait_for_all(what: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
