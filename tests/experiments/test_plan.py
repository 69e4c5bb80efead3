"""What a plan counts in a compiled program, and what it advises."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from experiments._compilers import check_topology
from experiments._hlo import collectives
from memcache_jax.sharding import make_mesh
from memcache_jax.training import default_config


def test_collectives_count_once_for_each_trip_of_a_loop():
    def part(x):
        def turn(x, _):
            return lax.ppermute(x, "seq", [(i, (i + 1) % 8) for i in range(8)]), None

        x = lax.scan(turn, x, None, length=5)[0]
        return lax.all_gather(x, "seq", axis=0, tiled=True)

    with jax.set_mesh(make_mesh(dict(seq=8))):
        mapped = jax.shard_map(part, in_specs=P("seq"), out_specs=P(), check_vma=False)
        text = jax.jit(mapped).lower(jnp.ones((16, 3))).compile().as_text() or ""
    assert collectives(text) == {
        "all-gather": (1, 16 * 3 * 4),
        "collective-permute": (5, 5 * 2 * 3 * 4),
    }


def test_an_asynchronous_collective_counts_once():
    text = """
ENTRY %main (x: f32[4]) -> f32[8] {
  %start = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}
  ROOT %done = f32[8]{0} all-gather-done(%start)
}
"""
    assert collectives(text) == {"all-gather": (1, 32)}


def test_a_chain_of_fusions_is_one_collective():
    text = """
%begins (x: f32[4]) -> f32[8] {
  %g.0 = f32[8]{0} all-gather(%x), channel_id=1, frontend_attributes={chain_id="0"}
  ROOT %start = f32[8]{0} custom-call(%g.0), custom_call_target="AsyncCollectiveStart"
}

%goes_on (x: f32[4]) -> f32[8] {
  ROOT %g.1 = f32[8]{0} all-gather(%x), channel_id=1, frontend_attributes={chain_id="0"}
}

%ends (x: f32[4]) -> f32[8] {
  %g.2 = f32[8]{0} all-gather(%x), channel_id=1, frontend_attributes={chain_id="0"}
  ROOT %done = f32[8]{0} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[4]) -> f32[8] {
  %a = f32[8]{0} fusion(%x), kind=kCustom, calls=%begins
  %b = f32[8]{0} fusion(%x), kind=kCustom, calls=%goes_on
  ROOT %c = f32[8]{0} fusion(%x), kind=kCustom, calls=%ends
}
"""
    assert collectives(text) == {"all-gather": (1, 32)}


@pytest.mark.slow
def test_a_layer_is_told_apart_from_attention():
    from experiments._crossing import crossing

    config = default_config()
    config.sequence_length, config.batch_size = 64, 2
    config.model.update(features=16, num_heads=2)
    config.model.memory = ConfigDict({"name": "SSD"})
    config.model.segmentation = ConfigDict({"name": "Constant", "size": 4})
    mesh = make_mesh(dict(seq=8))
    with jax.set_mesh(mesh):
        found = {pass_[:2]: pass_[2] for pass_ in crossing(config, mesh, {})}
    tokens, row = 2 * 64, 2 * 8  # of all rows, and of all heads
    keys_and_values = 2 * tokens * row * 4
    assert found["attention", "forward"] == {"all-gather": (2, keys_and_values)}
    pooled = tokens // 4 * row * 4
    assert found["SSD", "forward"]["all-gather"][1] == pooled + pooled * 8


def test_advice_follows_what_fills_the_memory():
    from experiments._advice import changes

    config = default_config()
    config.batch_size = 64
    mesh = dict(data=4, fsdp=2, seq=1, tensor=1)
    activations = changes(config, dict(mesh=mesh, hbm=16, state_bytes=1))
    assert [line.split("=")[0] for line in activations] == [
        "--config.model.remat",
        "--config.accumulate",
        "--config.model.dtype",
    ]
    config.model.remat = True
    state = changes(config, dict(mesh=mesh, hbm=16, state_bytes=15))
    assert state[0].startswith("--config.mesh.fsdp=8 --config.mesh.data=1")


def test_advised_meshes_fill_the_chips_and_divide_the_model():
    from experiments._advice import changes

    config = default_config()
    config.model.update(remat=True, dtype="bfloat16", num_heads=4)

    def advised(data, fsdp, seq, tensor):
        config.batch_size = data * fsdp
        sizes = dict(data=data, fsdp=fsdp, seq=seq, tensor=tensor)
        lines = changes(config, dict(mesh=sizes, hbm=16, state_bytes=1))
        for line in lines:
            flags = [flag.split("=") for flag in line.split(":")[0].split() if "mesh" in flag]
            given = sizes | {name.removeprefix("--config.mesh."): int(n) for name, n in flags}
            make_mesh(given, devices=jax.devices()[: data * fsdp * seq * tensor])
            assert not config.model.num_heads % given["tensor"]
        return [line.split(":")[0] for line in lines]

    # 512 tokens are four segments.
    seq, tensor, _ = advised(2, 2, 1, 1)
    assert seq == "--config.mesh.seq=2 --config.mesh.data=1 --config.accumulate=2"
    assert tensor == "--config.mesh.tensor=2 --config.mesh.data=1 --config.accumulate=2"
    ring, tensor = advised(1, 2, 4, 1)
    assert ring == "--config.model.exchange=ring"
    assert tensor == "--config.mesh.tensor=2 --config.mesh.fsdp=1 --config.accumulate=2"
    assert advised(1, 2, 1, 4) == [seq.replace("data", "fsdp")]
    assert advised(1, 1, 1, 8) == []


def test_parts_of_a_sequence_are_advised_where_the_rule_allows_them():
    from experiments._advice import changes

    config = default_config()
    config.model.update(remat=True, dtype="bfloat16", num_heads=3)
    config.model.memory = ConfigDict({"name": "Titans"})
    config.model.segmentation = ConfigDict({"name": "Logarithmic", "size": 128})
    report = dict(mesh=dict(data=2, fsdp=1, seq=1, tensor=1), hbm=16, state_bytes=1)

    def parts():
        return any("mesh.seq=2" in line for line in changes(config, report))

    assert not parts()
    config.model.memory = ConfigDict({"name": "SSD"})
    assert parts()
    # One segment goes on over the parts.
    config.model.segmentation = ConfigDict({"name": "Constant", "size": 2**20})
    assert parts()


def test_memories_beside_attention_count():
    from configs.pretrained import get_config
    from experiments._advice import memory_mixers
    from tests.pretrained.test_read import FOLDERS

    config = get_config()
    config.pretrained = str(FOLDERS / "falcon_h1")
    assert {type(mixer.memory).__name__ for mixer in memory_mixers(config)} == {"SSD"}


@pytest.mark.parametrize("topology", ["", "v5e:0x0", "v5e:4x0", "v5p=2x2x0", "v4_00x4_twisted"])
def test_a_topology_of_no_chips(topology):
    with pytest.raises(ValueError, match="at least one chip along each axis"):
        check_topology(topology)
    for some in ("v5e:16x16", "v5p:10x20x2", "v5e:2x4_untwisted"):
        check_topology(some)
