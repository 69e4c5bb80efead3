"""What to change where a run does not fit its chips."""

from typing import Any


def changes(config: Any, report: dict[str, Any]) -> list[str]:
    """Up to three changes of the configuration that would need less memory, the best first.

    What a change saves is estimated from the state's bytes on a chip and the memory there is: state
    that is not divided over all chips comes first where it is most of it, else activations do.
    """
    mesh = report["mesh"]
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"] * config.accumulate)
    of_activations = []
    if not config.model.remat:
        of_activations.append("--config.model.remat=True: recompute blocks in the backward pass")
    if rows > 1:
        of_activations.append(
            f"--config.accumulate={2 * config.accumulate}: half the rows at a time"
        )
    if config.model.dtype == "float32":
        of_activations.append("--config.model.dtype=bfloat16: activations of half the size")
    of_activations.append(
        f"--config.mesh.seq={2 * mesh['seq']}: half of each sequence on a chip (independent starts)"
    )
    of_activations.append(f"--config.mesh.tensor={2 * mesh['tensor']}: half of the heads on a chip")
    of_state = []
    if mesh["data"] > 1:
        of_state.append(
            f"--config.mesh.fsdp={mesh['data'] * mesh['fsdp']} --config.mesh.data=1: "
            "parameters and optimizer divided over all chips"
        )
    mostly_state = report["hbm"] is not None and report["state_bytes"] > report["hbm"] / 2
    return (of_state + of_activations if mostly_state else of_activations + of_state)[:3]
