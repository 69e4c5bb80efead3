"""Suggestions for runs that do not fit their chips."""

from typing import Any


def changes(config: Any, report: dict[str, Any]) -> list[str]:
    """Returns up to three changes of the configuration that save memory, the best first.

    If the state takes more than half of a chip's memory, changes that divide it over more chips
    come first, otherwise those that shrink activations. Suggested meshes use all chips and divide
    the model's heads and segments evenly.
    """
    from memcache_jax.sharding.memory_caching import fits_ring
    from memcache_jax.training.pretrained import PublicModel

    if (public := PublicModel.of(config, digest=False)) is not None:
        config = public.resolved(config)
    mesh, model = report["mesh"], config.model
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"] * config.accumulate)
    twice = f"--config.accumulate={2 * config.accumulate}"
    of_activations = []
    if not model.remat:
        of_activations.append("--config.model.remat=True: recompute blocks in the backward pass")
    if rows > 1:
        of_activations.append(f"{twice}: half the rows at a time")
    if model.dtype == "float32":
        of_activations.append("--config.model.dtype=bfloat16: activations of half the size")
    mixers = memory_mixers(config)
    if mesh["seq"] > 1 and any(
        mixer.exchange == "gather" and fits_ring(mixer.segmentation, config.sequence_length)
        for mixer in mixers
    ):
        of_activations.append("--config.model.exchange=ring: states of one part at a time")
    # These halve the devices along the batch, so that each has twice the rows: accumulate twice.
    if _divides_time(config, mixers, 2 * mesh["seq"]) and (flags := _doubled(config, mesh, "seq")):
        of_activations.append(f"{flags} {twice}: half of each sequence on a chip")
    if not model.num_heads % (2 * mesh["tensor"]) and (flags := _doubled(config, mesh, "tensor")):
        of_activations.append(f"{flags} {twice}: half of the heads on a chip")
    of_state = []
    if mesh["data"] > 1:
        of_state.append(
            f"--config.mesh.fsdp={mesh['data'] * mesh['fsdp']} --config.mesh.data=1: "
            "parameters and optimizer divided over all chips"
        )
    mostly_state = report["hbm"] is not None and report["state_bytes"] > report["hbm"] / 2
    return (of_state + of_activations if mostly_state else of_activations + of_state)[:3]


def memory_mixers(config: Any) -> list[Any]:
    """The mixers of a configuration's model that cache states of memories."""
    from memcache_jax.nn import MemoryCachingMixer
    from memcache_jax.nn.parallel import side_by_side
    from memcache_jax.nn.recurrent import RecurrentMixer
    from memcache_jax.training.pretrained import PublicModel, run_model

    mixers = run_model(config, PublicModel.of(config, digest=False)).mixers
    every = [x for mixer in mixers for x in side_by_side(mixer).values()]
    return [x for x in every if isinstance(x, MemoryCachingMixer | RecurrentMixer)]


def _divides_time(config: Any, mixers: list[Any], parts: int) -> bool:
    from memcache_jax.sharding.memory_caching import check_parts, is_carried

    try:
        for mixer in mixers:
            whole = mixer.memory, mixer.aggregation, mixer.segmentation, config.sequence_length
            if is_carried(*whole):
                continue
            check_parts(
                parts,
                config.sequence_length,
                memory=mixer.memory,
                segmentation=mixer.segmentation,
                start=mixer.start,
                implementation=mixer.implementation,
                exchange=mixer.exchange,
            )
    except ValueError:
        return False
    return True


def _doubled(config: Any, mesh: dict[str, int], axis: str) -> str:
    """Returns the flags of a mesh with twice the devices along an axis, or "" if there is none."""
    for other in ("data", "fsdp"):
        sizes = mesh | {axis: 2 * mesh[axis], other: mesh[other] // 2}
        slices = config.mesh.slices
        if mesh[other] % 2 == 0 and not (sizes["data"] % slices and sizes["fsdp"] % slices):
            return " ".join(f"--config.mesh.{name}={sizes[name]}" for name in (axis, other))
    return ""
