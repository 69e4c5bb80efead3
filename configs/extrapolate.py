"""Loss by position far past the training length, on the Python files of this machine.

Command:   python -m experiments.extrapolate --config=configs/extrapolate.py \
               --workdir=runs/extrapolate
           on two CPU cores, --config=configs/extrapolate.py:cpu
Hardware:  one GPU; or two CPU cores
Time:      14 minutes on two cores of a busy machine
Expected:  on two cores, bits per byte at positions 1,024 to 2,048 after training on 256, on
           2026-11-22: Titans 2.36, with caches added after training 2.10, trained with GRM 2.11,
           Transformer 4.44. Not run on a GPU.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import demo


def get_config(machine: str = "gpu") -> Any:
    """Returns the configuration for a ``"gpu"`` or two cores of a ``"cpu"``."""
    if machine not in ("gpu", "cpu"):
        raise ValueError(f"the part after the colon must be gpu or cpu, got {machine!r}")
    config = ConfigDict()
    config.base = "titans"  # the rule that also gets caches after training
    config.models = ("titans", "titans_grm", "titans_ssc", "transformer")  # of mc.presets.NAMES
    config.segment, config.top_k = 256, 4
    config.memory = ConfigDict(dict(chunk_size=32, expansion=2))  # fields of the memories
    config.eval_length = 16_384  # tokens of an evaluated row
    config.eval_tokens = 524_288  # of all evaluated rows, at most
    config.eval_batch_size = 1
    config.first_bin = 64  # tokens; from the third bin on, each is twice as long as the previous
    training = config.training = demo.get_config()
    training.steps, training.batch_size, training.sequence_length = 3000, 32, 1024
    training.log_every, training.eval_every, training.checkpoint_every = 50, 500, 500
    training.model.num_layers, training.model.features, training.model.num_heads = 6, 512, 8
    training.model.dtype = "bfloat16"
    training.optimizer.learning_rate, training.optimizer.warmup_steps = 1e-3, 200
    training.sample.max_new_tokens = 0
    training.data.isolate_documents = False  # the long rows that are measured are packed too
    if machine == "cpu":
        config.segment, config.top_k = 64, 2
        config.eval_length, config.eval_tokens, config.first_bin = 2048, 32_768, 32
        training.steps, training.batch_size, training.sequence_length = 400, 8, 256
        training.log_every, training.eval_every, training.checkpoint_every = 20, 200, 100
        training.model.num_layers, training.model.features, training.model.num_heads = 2, 128, 2
        training.model.dtype = "float32"
        training.optimizer.learning_rate, training.optimizer.warmup_steps = 2e-3, 30
    return config
