"""The configuration of a run: defaults, checks, and the differences between two of them."""

import functools
import json
import logging
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_dict

from memcache_jax._checks import (
    check_choice,
    check_flag,
    check_instance,
    check_integer,
    check_number,
    shown,
)

if TYPE_CHECKING:
    Config = Any  # ConfigDict says of every attribute that it may be anything but a ConfigDict
else:
    Config = ConfigDict

_log = logging.getLogger(__name__)

# Keys that may change when a run resumes: no step's result depends on them, except through the
# schedule, whose length is `steps`.
_MAY_CHANGE = (
    "steps",
    "resume",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "wait_for_checkpoints",
    "tensorboard",
    "sample.",
    "model.implementation",
    "model.exchange",
    "model.keep_states",
    "model.offload_states",
    "mesh.",
    "accumulate",
    "data.skip_bad_lines",  # lines that were read before are the same with and without it
)

_LIMITS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "be at least 1": (
        lambda x: x >= 1,
        (
            *("steps", "batch_size", "sequence_length", "log_every", "eval_every"),
            *("checkpoint_every", "keep_checkpoints", "accumulate", "data.streams", "lora.rank"),
        ),
    ),
    "be above 0": (
        lambda x: x > 0,
        ("optimizer.learning_rate", "optimizer.clip_norm", "lora.alpha"),
    ),
    "not be negative": (
        lambda x: x >= 0,
        (
            *("optimizer.weight_decay", "optimizer.z_loss", "optimizer.final_fraction"),
            *("sample.temperature", "sample.max_new_tokens", "sample.every"),
        ),
    ),
    "be in [0, 1)": (lambda x: 0 <= x < 1, ("optimizer.b1", "optimizer.b2")),
    "be in [0, 2**32)": (lambda x: 0 <= x < 2**32, ("seed",)),
    "be in (0, 1]": (lambda x: 0 < x <= 1, ("sample.top_p",)),
}

# Keys that may be left open: new runs take True, and runs from before there was the key go on
# without what it does.
_OPEN = {
    "data.isolate_documents": "documents that are packed into one row see each other",
    "model.bounded": "the steps of deep memories have no bound",
    "model.memory.decay": "DLA forgets nothing",
}
# Parts whose keys depend on what they name.
_FREE = ("model.memory", "model.aggregation", "model.segmentation", "optimizer.arguments")

# Keys that runs of earlier versions lack, with the values they used.
_ADDED: dict[str, Any] = {"data.streams": 1, "optimizer.name": "adamw"}
_ADDED |= dict.fromkeys(_OPEN, False)
_ADDED |= {"sample.every": 0, "model.aggregation.num_keys": 1, "model.aggregation.exact": 0}
_ADDED |= {"model.aggregation.router": None}
_ADDED |= {"pretrained": None, "tune": "all", "lora.rank": 16, "lora.alpha": 16.0}


def default_config() -> Config:
    """Returns a complete configuration, the starting point of the files in ``configs/``.

    Every key can be set on the command line, as in ``--config.optimizer.learning_rate=1e-3``.
    ``memory``, ``aggregation`` and ``segmentation`` can be replaced as a whole, as in
    ``--config.model.memory="{'name': 'LinearAttention'}"``.

    Example:
      >>> from memcache_jax.training import default_config, model_config
      >>> model_config(default_config().model).mixers[0].aggregation
      GRM(gate='content', pooling='mean', num_keys=1, exact=0)
    """
    config: Config = ConfigDict()
    config.seed = 0  # of the initial parameters, the order of the data and the sample
    config.steps = 1000  # updates; also the length of the learning rate schedule
    config.batch_size = 8  # rows per update
    config.sequence_length = 512  # tokens predicted per row
    config.accumulate = 1  # gradient accumulation: parts of a batch, computed in sequence
    config.mesh = ConfigDict()  # devices along each axis; one may be -1, for the rest
    config.mesh.data = 1  # copies of the model
    config.mesh.fsdp = 1  # shards of parameters and optimizer state, gathered for use
    config.mesh.seq = 1  # parts of a sequence; also divides the parameters
    config.mesh.tensor = 1  # shards of heads and hidden widths
    config.mesh.slices = 1  # TPU slices connected by a slower network
    config.resume = False  # from the newest checkpoint in the workdir, if there is one
    config.log_every = 10  # steps between lines of metrics
    config.eval_every = 250  # steps between evaluations on held-out text
    config.checkpoint_every = 250  # steps between checkpoints
    config.keep_checkpoints = 2  # how many of the newest to keep
    # Whether steps wait until a checkpoint is on disk: a kill costs `checkpoint_every` steps at
    # most. If False, they go on while it is written, and a kill before its end costs them too.
    config.wait_for_checkpoints = True
    config.tensorboard = False  # also write metrics for TensorBoard (extra `tensorboard`)
    # The folder of a public model to begin with (extra `pretrained`). Of `config.model` the caches
    # are then taken (aggregation, segmentation, start), and how to compute; all else is its own.
    config.pretrained = config_dict.placeholder(str)
    # What of it is trained: "all"; "caches", connectors and temperatures; or "lora", also adapters.
    config.tune = "all"
    config.lora = ConfigDict()
    config.lora.rank = 16  # of an adapter (alpha / rank) B A of each projection of the blocks
    config.lora.alpha = 16.0

    config.model = ConfigDict()
    config.model.vocab_size = 257  # at least the tokenizer's; 257 for bytes
    config.model.num_layers = 4  # a multiple of the number of mixers
    config.model.features = 256
    config.model.num_heads = 4
    config.model.head_dim = config_dict.placeholder(int)  # features / num_heads by default
    config.model.mlp_features = config_dict.placeholder(int)  # 8/3 features by default; 0: no MLP
    config.model.tie_embeddings = False
    config.model.remat = False  # recompute activations in the backward pass, to save memory
    config.model.keep_states = False  # with remat: keep memories' states
    config.model.offload_states = False  # with remat: keep memories' states on the host
    config.model.dtype = "float32"  # of activations, or "bfloat16"; parameters are float32
    config.model.mixers = ("memory_caching",)  # of consecutive blocks, repeated; see models.py
    config.model.memory = ConfigDict(
        {"name": "Titans", "chunk_size": 32, "expansion": 2, "depth": 2}
    )  # a class of mc.memories and its arguments
    config.model.aggregation = ConfigDict({"name": "GRM"})  # mc.GRM and the others
    config.model.segmentation = ConfigDict({"name": "Constant", "size": 128})  # mc.Constant, ...
    config.model.start = "independent"  # initial state of a segment, or "checkpoint"
    config.model.connector = "learned"  # compared with keys by content gates, or "query"
    config.model.distances = 64  # number of distances that position gates distinguish
    config.model.implementation = config_dict.placeholder(str)  # "pallas_tpu", "pallas_gpu", "xla"
    # Whether deep memories bound their steps (`max_step_norm`). If not set: as isolate_documents.
    config.model.bounded = config_dict.placeholder(bool)
    config.model.exchange = "gather"  # of states between parts of a sequence, or "ring"
    config.model.window = 256  # tokens that windowed attention sees, also with a memory as context
    config.model.rope_base = 10_000.0  # of attention's rotary embeddings

    config.data = ConfigDict()
    # Folders, files, globs: text and .jsonl, also in .gz, .bz2, .xz, .zst; .parquet (extra `data`).
    config.data.files = ()
    config.data.skip_bad_lines = False  # of .jsonl files: those without text; else an error
    config.data.exclude = ()  # fnmatch patterns of full paths to skip
    config.data.heldout_files = ()  # as files; if empty, a fraction of them, or of one file's text
    config.data.heldout_fraction = 0.05
    config.data.heldout_tokens = 65_536  # at most, per evaluation
    config.data.text_field = "text"  # of .jsonl and .parquet files
    # Or the path of a Hugging Face `tokenizers` JSON file; "pretrained" is the public model's.
    config.data.tokenizer = "bytes"
    config.data.streams = 1  # feeding each batch; a process reads those of its devices
    # Whether documents that are packed into one row cannot see each other (`document_ids`, the
    # segment ids of other libraries). If not set: True in a new run, as before in a resumed one.
    config.data.isolate_documents = config_dict.placeholder(bool)
    config.data.eos_token = config_dict.placeholder(str)  # ends a document; detected by default

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or another of optax: "lion", "adafactor", "sgd", ...
    config.optimizer.arguments = ConfigDict()  # its own further arguments
    config.optimizer.learning_rate = 1e-3  # at the end of the warm-up
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.1  # of the peak rate, at the last step
    config.optimizer.weight_decay = 0.1  # of matrices and embeddings, if the optimizer has it
    config.optimizer.b1 = 0.9  # if the optimizer has it, and so the next
    config.optimizer.b2 = 0.95
    config.optimizer.clip_norm = 1.0  # of the gradient's global norm
    config.optimizer.z_loss = 0.0  # weight of the mean squared log-partition; 1e-4 is usual

    config.sample = ConfigDict()  # text generated at the end of the run
    config.sample.every = 0  # steps between samples on the way, which are printed; 0 for none
    config.sample.prompt = ""  # if empty, the end-of-document token
    config.sample.max_new_tokens = 256  # 0 for no sample
    config.sample.temperature = 0.8
    config.sample.top_p = 0.95
    return config


def check_config(config: Config) -> None:
    """Checks the keys, the kinds of all values, and the values that no later code checks.

    Raises:
      ValueError: for a key that is unknown or missing, or a value of another kind or out of range.
    """
    check_keys(config, default_config())
    values = flatten_dict(to_json(config), sep=".")
    for wanted, (good, names) in _LIMITS.items():
        for name in names:
            if not good(values[name]):
                raise ValueError(f"{name} must {wanted}, got {values[name]}")
    try:
        config.sample.prompt.encode()  # at the end of a run it would be too late
    except (AttributeError, UnicodeEncodeError) as e:
        raise ValueError(f"sample.prompt must be text, got {config.sample.prompt!r}") from e
    check_choice("tune", config.tune, ("all", "caches", "lora"))
    if config.tune != "all" and config.pretrained is None:
        raise ValueError(f"tune={config.tune!r} needs pretrained, the folder of a public model")
    for name in ("accumulate", "data.streams"):
        if config.batch_size % values[name]:
            raise ValueError(
                f"batch_size must be a multiple of {name}, got {config.batch_size} and "
                f"{values[name]}"
            )


def check_keys(
    config: Any,
    default: Config,
    prefix: str = "",
    *,
    optional: Collection[str] = (),
    others: bool = False,
) -> None:
    """Raises ValueError unless a configuration has the keys of the default one, and their kinds.

    Args:
      config: the configuration, or a part of it.
      default: the default one, or the same part.
      prefix: what names of keys begin with, such as ``"model."``.
      optional: keys that may be missing.
      others: whether there may be keys that the default one has not.
    """
    if not isinstance(config, (ConfigDict, Mapping)):
        what = f"{prefix[:-1]} " if prefix else "the configuration "
        raise ValueError(f"{what}must be a ConfigDict, got {shown(config)}")
    unknown = sorted(map(str, set(config) - set(default)))
    if unknown and not others:
        raise ValueError(
            f"the configuration has the unknown key {prefix}{unknown[0]}; known are "
            f"{', '.join(prefix + key for key in default)}"
        )
    for key in default:
        name = prefix + key
        if key not in config:
            if key in optional:
                continue
            raise ValueError(f"the configuration lacks the key {name}")
        value = config[key]
        if name in _FREE:
            if not isinstance(value, (ConfigDict, Mapping)):
                raise ValueError(f"{name} must be a ConfigDict, got {shown(value)}")
        elif isinstance(default[key], ConfigDict):
            check_keys(value, default[key], f"{name}.")
        elif value is not None or default[key] is not None:
            _check_kind(name, value, default.get_type(key))


def _check_kind(name: str, value: Any, kind: type) -> None:
    """Raises ValueError unless a value is of the kind that a key has."""
    if kind is bool:
        check_flag(name, value)
    elif kind is int:
        check_integer(name, value, -(2**63), most=2**63 - 1)
    elif kind is float:
        check_number(name, value)
    elif kind is str:
        check_instance(name, value, str, "a string")
    else:
        strings = isinstance(value, (tuple, list)) and all(isinstance(x, str) for x in value)
        if not strings:
            raise ValueError(f"{name} must be a tuple of strings, got {shown(value)}")


def to_json(config: Config) -> dict[str, Any]:
    """Returns the configuration as plain JSON types, from which ``ConfigDict`` restores it.

    Raises:
      ValueError: for values that JSON cannot hold.
    """
    try:
        return json.loads(config.to_json())
    except TypeError as e:
        raise ValueError(f"the configuration must hold numbers, strings and the like: {e}") from e


def with_choices_made(config: Config, notes: Mapping[str, Any] | None = None) -> Config:
    """Returns the configuration with those keys set that may be left open.

    They are ``data.isolate_documents``, ``model.bounded`` and, for DLA, ``model.memory.decay``. New
    runs have all three. A run that goes on keeps what it has, and one from before there was a key
    goes on without.

    Args:
      config: of the run.
      notes: those of the checkpoint from which the run goes on; None for a new run.
    """
    config = config.copy_and_resolve_references()
    flat = flatten_dict(to_json(config), sep=".")
    before = None if notes is None else flatten_dict(notes["config"], sep=".")
    for key, without in _OPEN.items():
        *path, name = key.split(".")
        if flat.get(key) is not None or (
            name == "decay" and flat.get("model.memory.name") != "DLA"
        ):
            continue
        made = True if before is None else before.get(key, False)
        if before is not None and key not in before:
            _log.info("This run began before there was %s, and goes on without: %s.", key, without)
        part = functools.reduce(lambda tree, step: tree[step], path, config)
        with part.unlocked():
            part[name] = made
    return config


def config_differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Returns a line for each key whose value differs, as ``key: stored, now given``.

    Ignores keys that may change when a run resumes, such as ``log_every`` and ``steps``.

    Args:
      stored: a configuration as ``to_json`` returns it.
      given: the other configuration.
    """
    flat_stored, flat_given = (_ADDED | flatten_dict(tree, sep=".") for tree in (stored, given))

    def show(flat: dict[str, Any], key: str) -> str:
        return repr(flat[key]) if key in flat else "nothing"

    return [
        f"{key}: {show(flat_stored, key)}, now {show(flat_given, key)}"
        for key in sorted(flat_stored.keys() | flat_given.keys())
        if not key.startswith(_MAY_CHANGE) and show(flat_stored, key) != show(flat_given, key)
    ]
