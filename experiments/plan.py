"""Compiles a run's programs for a TPU pod, without one, and reports what each chip needs.

    python -m experiments.plan --config=configs/lm_760m.py --topology=v5e:16x16 \
        --config.mesh.fsdp=-1 --config.mesh.tensor=2

The programs are the train step and the held-out evaluation. Needs libtpu (``pip install libtpu``)
but no TPU. Memory is the compiler's own analysis for one chip (``_memory.py``). Collectives are
counted in the compiled train step, once per trip inside loops; their bytes are those that a chip
receives or sums. With ``--config.pretrained=FOLDER`` only the folder's ``config.json`` is read.

With ``--layer`` it compiles only what the first layer with a memory does between its projections,
forward and in a gradient, and prints its collectives beside those of attention of the same shape.
"""

import json
import math
import os
import sys
import time
from typing import Any

# libtpu only describes the topology's devices; JAX itself runs on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from absl import flags

from experiments._advice import changes
from experiments._compilers import check_topology
from experiments._program import ConfigFlag, run

_CONFIG = ConfigFlag()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Kind of TPU and shape of the slice, such as v5e:16x16.", required=True
)
_JSON = flags.DEFINE_string("json", None, "File to write the numbers to.")
_QUICK = flags.DEFINE_bool("quick", False, "Compile with less effort: faster, with similar memory.")
_LAYER = flags.DEFINE_bool("layer", False, "Print the collectives of one layer's operation.")

GIB = 2**30
HBM = {"v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "v4": 32 * GIB}


def plan(config: Any, topology: str, *, quick: bool = False) -> dict[str, Any]:
    """Compiles the train step of a configuration, and its evaluation, for a topology.

    Args:
      config: as from ``memcache_jax.training.default_config``, with the mesh's sizes.
      topology: libtpu's name of the topology.
      quick: compile with less effort.

    Returns:
      The figures of the report, by name; ``evaluation`` has those of the held-out evaluation's
      memory. If a program does not fit, ``overflow`` has the
      compiler's message; if its text cannot be read back, ``unlisted`` has the error in place of
      ``collectives``.

    Raises:
      ValueError: for an unknown topology, or an invalid configuration.
    """
    import jax
    import jax.numpy as jnp

    from experiments._flops import count_flops
    from experiments._hlo import collectives, printed
    from experiments._memory import memory_of
    from memcache_jax.sharding import batch_sharding
    from memcache_jax.training.config import check_config, with_choices_made
    from memcache_jax.training.documents import separator
    from memcache_jax.training.loop import config_mesh
    from memcache_jax.training.optimizer import make_optimizer
    from memcache_jax.training.pretrained import PublicModel, run_model
    from memcache_jax.training.step import abstract_state, make_eval_step, make_train_step

    check_config(config)
    config, frozen = with_choices_made(config), frozenset()
    if (public := PublicModel.of(config, digest=False)) is not None:
        config, frozen = public.resolved(config), public.frozen(config)
    devices = _devices(topology)
    mesh = config_mesh(config, devices)
    assert mesh is not None, "of these devices"
    model = run_model(config, public)
    optimizer = make_optimizer(config.optimizer, config.steps)
    shape = config.batch_size, config.sequence_length + 1
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)

    graph, alone = abstract_state(model, optimizer, frozen=frozen)
    options = config.optimizer.z_loss, config.accumulate
    end_token = separator(config, 0, graph, alone.whole)  # any id: the program is the same
    step = make_train_step(graph, optimizer, *options, end_token=end_token)
    flops = count_flops(step, alone, tokens)

    report: dict[str, Any] = dict(
        topology=topology,
        chips=len(devices),
        mesh=dict(mesh.shape),
        parameters=sum(x.size for x in jax.tree.leaves(alone.whole)),
        trained=sum(x.size for x in jax.tree.leaves(alone.params)),
        tokens_per_step=config.batch_size * config.sequence_length,
        tokens_per_chip=config.batch_size * config.sequence_length / len(devices),
        flops_per_chip=flops / len(devices),
        hbm=HBM.get(topology.split(":")[0]),
    )
    graph, target = abstract_state(model, optimizer, mesh, frozen)

    def bytes_per_chip(tree: Any) -> int:
        return sum(
            x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
            for x in jax.tree.leaves(tree)
        )

    report["state_bytes"] = bytes_per_chip(target)
    with jax.set_mesh(mesh):
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
        separator(config, 0, graph, target.whole)
        train_step: Any = make_train_step(graph, optimizer, *options, target, end_token)
        mask = jax.ShapeDtypeStruct(shape[:1], jnp.float32, sharding=batch_sharding(mesh))
        eval_step: Any = make_eval_step(graph, end_token, config.accumulate)
        lowered = {
            "train step": train_step.lower(target, tokens),
            "evaluation": eval_step.lower(target.whole, tokens, mask),
        }
        programs, seconds = [], {}
        for name, each in lowered.items():
            begin = time.perf_counter()
            try:
                programs.append(each.compile(compiler_options=_effort(quick)))
            except jax.errors.JaxRuntimeError as e:
                if "RESOURCE_EXHAUSTED" not in str(e):
                    raise
                report["overflow"] = f"{name}: {_first_lines(str(e))}"
                return report
            seconds[name] = time.perf_counter() - begin
        compiled, evaluation = programs
        report["compile_seconds"] = seconds
    report |= memory_of(compiled)
    # While it runs, the optimizer's state is there too.
    report["evaluation"] = memory_of(evaluation)
    report["evaluation"]["peak_bytes"] += bytes_per_chip(target.opt_state)
    try:
        report["collectives"] = collectives(printed(compiled))
    except NotImplementedError as e:
        report["unlisted"] = str(e)
    return report


def print_layer(config: Any, topology: str, *, quick: bool = False) -> list[dict[str, Any]]:
    """Prints what a layer with a memory moves, beside attention; arguments as for ``plan``.

    Returns:
      The rows of the table.

    Raises:
      ValueError: for an unknown topology, an invalid configuration, or a model without memories.
    """
    import jax

    from experiments._crossing import crossing
    from memcache_jax.training.config import check_config
    from memcache_jax.training.loop import config_mesh

    check_config(config)
    mesh: Any = config_mesh(config, _devices(topology))
    print(f"{'operation':16} {'pass':9} {'collective':20} {'count':>6} {'MiB a chip':>11}")
    rows = []
    with jax.set_mesh(mesh):
        for operation, kind, found in crossing(config, mesh, _effort(quick)):
            for name, (count, size) in found.items():
                row = dict(operation=operation, kind=kind, collective=name, count=count, bytes=size)
                rows.append(row)
                mib = f"{size / 2**20:11.2f}"
                print(f"{operation:16} {kind:9} {name:20} {count:6} {mib}", flush=True)
    return rows


def _devices(topology: str) -> Any:
    """The described chips of a topology."""
    from jax.experimental import topologies

    check_topology(topology)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as e:  # libtpu raises several kinds
        raise ValueError(f"libtpu has no topology {topology!r}: {e}") from e


def _effort(quick: bool) -> dict[str, Any]:
    """Options of the compiler."""
    return {"exec_time_optimization_effort": -1.0} if quick else {}


def _first_lines(message: str) -> str:
    return " ".join(message.split())[:400]


def describe(config: Any, report: dict[str, Any]) -> str:
    """Formats the report as lines of text."""

    def gib(size: float) -> str:
        return f"{size / GIB:8.2f} GiB"

    mesh = ", ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    lines = [
        f"{report['topology']}, {report['chips']} chips: {mesh}",
        f"parameters          {report['parameters']:,}, {report['trained']:,} trained",
        f"tokens              {report['tokens_per_step']:,} a step, "
        f"{report['tokens_per_chip']:,.0f} a chip",
        f"matrix products     {report['flops_per_chip'] / 1e12:.2f} TFLOP a chip and step",
        f"state               {gib(report['state_bytes'])} a chip",
    ]
    if "overflow" in report:
        lines += [
            "",
            f"This does not fit into a chip's memory: {report['overflow']}",
            "What helps most:",
            *(f"  {change}" for change in changes(config, report)),
        ]
        return "\n".join(lines)
    lines += [
        f"arguments           {gib(report['argument_bytes'])}",
        f"temporaries         {gib(report['temporary_bytes'])}",
        f"peak                {gib(report['peak_bytes'])}",
    ]
    lines += [
        f"evaluation          {gib(report['evaluation']['temporary_bytes'])} of temporaries",
        f"its peak            {gib(report['evaluation']['peak_bytes'])}",
    ]
    if report["hbm"] is not None:
        peak = max(report["peak_bytes"], report["evaluation"]["peak_bytes"])
        lines.append(f"left                {gib(report['hbm'] - peak)}")
    lines += [
        f"{name + ' compiled':20}{seconds:8.1f} s"
        for name, seconds in report["compile_seconds"].items()
    ]
    if "unlisted" in report:
        lines += ["", f"Collectives cannot be listed: {report['unlisted']}"]
        return "\n".join(lines)
    lines += ["", f"{'collective':20} {'a step':>8} {'GiB a chip':>12}"]
    lines += [
        f"{kind:20} {count:8,} {size / GIB:12.3f}"
        for kind, (count, size) in report["collectives"].items()
    ]
    return "\n".join(lines)


def program() -> None:
    """Prints the report."""
    config = _CONFIG.value
    if _LAYER.value:
        report: Any = print_layer(config, _TOPOLOGY.value, quick=_QUICK.value)
    else:
        report = plan(config, _TOPOLOGY.value, quick=_QUICK.value)
        print(describe(config, report), flush=True)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(report, file, indent=2)
    if "overflow" in report:
        sys.exit(2)


if __name__ == "__main__":
    run(program)
