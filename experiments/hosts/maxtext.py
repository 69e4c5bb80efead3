"""MaxText's training program on a tiny Llama of its own, with another ``self_attention``."""

import json
import tempfile
from pathlib import Path

from experiments.hosts import _host

CHANGES = [
    (
        """\
from maxtext.layers.attentions import Attention
""",
        """\
import memcache_jax as mc
""",
    ),
    (
        """\
    self.self_attention = Attention(
        config=config,
""",
        """\
    self.self_attention = mc.nn.adapters.MaxTextAttention(
        mixer=mc.nn.MemoryCachingMixer(mc.memories.GatedDeltaNet(), mc.GRM(), mc.Constant(16)),
        config=config,
""",
    ),
]
OPTIONS = dict(
    base_emb_dim=64,
    base_num_query_heads=4,
    base_num_kv_heads=4,
    head_dim=16,
    base_mlp_dim=128,
    base_num_decoder_layers=2,
    vocab_size=256,
    max_target_length=64,
    per_device_batch_size=2,
    steps=5,
    learning_rate=0.01,
    dataset_type="synthetic",
    hardware="cpu",
    attention="dot_product",
    run_name="host",
    enable_checkpointing=False,
    enable_tensorboard=False,
    enable_goodput_recording=False,
    monitor_goodput=False,
    skip_jax_distributed_system=True,
)


def run(devices: int) -> list[_host.Row]:
    """Five steps of MaxText's own ``train`` before and after the changes."""
    llama2 = _host.load("maxtext.models.llama2")

    before = _host.fell(train(devices))
    _host.change(llama2, CHANGES)
    after = _host.fell(train(devices))
    lines = _host.count_lines(CHANGES)
    result = f"loss {before}; with our layer {after}"
    return [_host.Row("MaxText train, Llama", _host.version("maxtext"), lines, result)]


def train(devices: int) -> list[float]:
    """The losses that the program logs."""
    maxtext, program = _host.load("maxtext"), _host.load("maxtext.trainers.pre_train.train")

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "metrics.jsonl"
        options = OPTIONS | dict(base_output_directory=folder, metrics_file=log)
        options["ici_fsdp_parallelism"] = devices
        config = Path(str(maxtext.__file__)).parent / "configs" / "base.yml"
        program.main(["train", str(config), *(f"{k}={v}" for k, v in options.items())])
        return [json.loads(line)["learning/loss"] for line in log.read_text().splitlines()]
