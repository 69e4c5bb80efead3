"""A run's configuration: its keys and defaults, its checks, how two of them differ."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_dict

if TYPE_CHECKING:
    Config = Any  # ConfigDict says of every attribute that it may be anything but a ConfigDict
else:
    Config = ConfigDict

# Keys that steer a run without changing what a given step computes; `steps` changes the schedule.
_STEERING = (
    "steps",
    "resume",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "tensorboard",
    "sample.",
    "model.implementation",
    "model.exchange",
    "model.offload_states",
    "mesh.",
    "accumulate",
)

# Keys that the runs of earlier versions lack, and what they did.
_ADDED = {"data.streams": 1, "optimizer.name": "adamw"}


def default_config() -> Config:
    """Returns a complete configuration, which files under ``configs/`` change.

    Every key can be set on the command line, as in ``--config.optimizer.learning_rate=1e-3``;
    ``memory``, ``aggregation`` and ``segmentation`` also as a whole, as in
    ``--config.model.memory="{'name': 'LinearAttention'}"``.

    Example:
      >>> from memcache_jax.training import default_config, model_config
      >>> model_config(default_config().model).mixers[0].aggregation
      GRM(gate='content', pooling='mean')
    """
    config: Config = ConfigDict()
    config.seed = 0  # of the initial parameters, the order of the data and the sample
    config.steps = 1000  # updates in all; the learning rate's schedule ends there
    config.batch_size = 8  # rows per update
    config.sequence_length = 512  # tokens predicted per row
    config.accumulate = 1  # parts of a batch whose gradients are computed one after the other
    config.mesh = ConfigDict()  # devices along each axis, one may be -1: all that are left
    config.mesh.data = 1  # copies of the model
    config.mesh.fsdp = 1  # shards of parameters and optimizer, gathered for use
    config.mesh.seq = 1  # parts of a sequence; parameters are divided over them too
    config.mesh.tensor = 1  # shards of heads and hidden widths
    config.mesh.slices = 1  # TPU slices that a slower network joins
    config.resume = False  # go on from the newest checkpoint in the workdir, if there is one
    config.log_every = 10  # steps between lines of metrics
    config.eval_every = 250  # steps between measurements on held-out text
    config.checkpoint_every = 250  # steps between checkpoints
    config.keep_checkpoints = 2  # the newest so many are kept
    config.tensorboard = False  # also write metrics for TensorBoard (extra `tensorboard`)

    config.model = ConfigDict()
    config.model.vocab_size = 257  # at least the tokenizer's; bytes have 257
    config.model.num_layers = 4  # a multiple of the number of mixers
    config.model.features = 256
    config.model.num_heads = 4
    config.model.head_dim = config_dict.placeholder(int)  # features / num_heads by default
    config.model.mlp_features = config_dict.placeholder(int)  # 8/3 features by default; 0: no MLP
    config.model.tie_embeddings = False
    config.model.remat = False  # recompute activations in the backward pass, to save memory
    config.model.offload_states = False  # with remat: what memories write waits on the host
    config.model.dtype = "float32"  # of the arithmetic, or "bfloat16"; parameters are float32
    config.model.mixers = ("memory_caching",)  # of consecutive blocks, repeated; see models.py
    config.model.memory = ConfigDict(
        {"name": "Titans", "chunk_size": 32, "expansion": 2, "depth": 2}
    )  # a class of mc.memories and its arguments
    config.model.aggregation = ConfigDict({"name": "GRM"})  # mc.GRM and the others
    config.model.segmentation = ConfigDict({"name": "Constant", "size": 128})  # mc.Constant, ...
    config.model.start = "independent"  # what a segment's memory begins with, or "checkpoint"
    config.model.connector = "learned"  # what gates by content compare with keys, or "query"
    config.model.distances = 64  # that gates by position tell apart
    config.model.implementation = config_dict.placeholder(str)  # "pallas_tpu", "pallas_gpu", "xla"
    config.model.exchange = "gather"  # of states between parts of a sequence, or "ring"
    config.model.window = 256  # tokens that sliding-window attention sees
    config.model.rope_base = 10_000.0  # of attention's rotary positions

    config.data = ConfigDict()
    config.data.files = ()  # folders, files or globs: text, .jsonl, .parquet (extra `data`)
    config.data.exclude = ()  # fnmatch patterns against full paths
    config.data.heldout_files = ()  # held out, named like files; else a fraction by file
    config.data.heldout_fraction = 0.05
    config.data.heldout_tokens = 65_536  # the most that are measured
    config.data.text_field = "text"  # of .jsonl and .parquet files
    config.data.tokenizer = "bytes"  # or the path of a Hugging Face `tokenizers` JSON file
    config.data.streams = 1  # that give rows to each batch; a process reads those of its devices
    config.data.eos_token = config_dict.placeholder(str)  # ends a document; found by default

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or another of optax: "lion", "adafactor", "sgd", ...
    config.optimizer.arguments = ConfigDict()  # its own further arguments
    config.optimizer.learning_rate = 1e-3  # at the end of the warm-up
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.1  # of the peak rate, reached at the last step
    config.optimizer.weight_decay = 0.1  # of matrices and embeddings, if the optimizer has it
    config.optimizer.b1 = 0.9  # if the optimizer has it, and so the next
    config.optimizer.b2 = 0.95
    config.optimizer.clip_norm = 1.0  # of the whole gradient
    config.optimizer.z_loss = 0.0  # weight of the mean squared log-partition; 1e-4 is usual

    config.sample = ConfigDict()  # the text written at the end
    config.sample.prompt = ""  # the end token where empty
    config.sample.max_new_tokens = 256  # 0 for no sample
    config.sample.temperature = 0.8
    config.sample.top_p = 0.95
    return config


def check_config(config: Config) -> None:
    """Checks the numbers that nothing else checks.

    Raises:
      ValueError: for a number that is out of range.
    """
    positive = ("steps", "batch_size", "sequence_length", "log_every", "eval_every")
    for name in (*positive, "checkpoint_every", "keep_checkpoints", "accumulate"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"batch_size must be a multiple of accumulate, got {config.batch_size} and "
            f"{config.accumulate}"
        )
    streams = config.data.streams
    if streams < 1 or config.batch_size % streams:
        raise ValueError(
            f"batch_size must be a multiple of data.streams, got {config.batch_size} and {streams}"
        )
    for name in ("learning_rate", "clip_norm"):
        if not config.optimizer[name] > 0:
            raise ValueError(f"optimizer.{name} must be above 0, got {config.optimizer[name]}")
    for name in ("weight_decay", "z_loss", "final_fraction"):
        if not config.optimizer[name] >= 0:
            raise ValueError(f"optimizer.{name} must not be negative, got {config.optimizer[name]}")
    for name in ("b1", "b2"):
        if not 0 <= config.optimizer[name] < 1:
            raise ValueError(f"optimizer.{name} must be in [0, 1), got {config.optimizer[name]}")
    if not config.sample.temperature >= 0:
        raise ValueError(
            f"sample.temperature must not be negative, got {config.sample.temperature}"
        )
    if not 0 < config.sample.top_p <= 1:
        raise ValueError(f"sample.top_p must be in (0, 1], got {config.sample.top_p}")
    if config.sample.max_new_tokens < 0:
        raise ValueError(
            f"sample.max_new_tokens must not be negative, got {config.sample.max_new_tokens}"
        )


def to_json(config: Config) -> dict[str, Any]:
    """Returns the configuration as JSON holds it, which ``ConfigDict`` takes back."""
    return json.loads(config.to_json())


def config_differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Returns a line for each key whose value differs, as ``key: stored, now given``.

    Keys that only steer a run, such as ``log_every``, may differ, and ``steps``.

    Args:
      stored: a configuration as ``to_json`` returns it.
      given: another.
    """
    flat_stored, flat_given = (_ADDED | flatten_dict(tree, sep=".") for tree in (stored, given))

    def show(flat: dict[str, Any], key: str) -> str:
        return repr(flat[key]) if key in flat else "nothing"

    return [
        f"{key}: {show(flat_stored, key)}, now {show(flat_given, key)}"
        for key in sorted(flat_stored.keys() | flat_given.keys())
        if not key.startswith(_STEERING) and show(flat_stored, key) != show(flat_given, key)
    ]
