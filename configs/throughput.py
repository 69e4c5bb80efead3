"""Figure 4 of the paper: training speed by length; also decoding speed.

Command:   python -m experiments.throughput --config=configs/throughput.py --workdir=runs/throughput
           on two CPU cores, --config=configs/throughput.py:cpu
Hardware:  one GPU with 80 GB; or two CPU cores
Time:      8 minutes on two cores
Expected:  on two cores on 2026-11-22, training at T = 4,096: SSD 8.2k tokens/s, its variants 6.4k
           to 7.4k, a Transformer 1.4k; decoding after 4,096 tokens 0.3 to 0.6 and 1.0 ms. Not run
           on a GPU. In the paper, training is between the base rule and the Transformer, with SSC
           near the base rule at every context length.
"""

from typing import Any

from ml_collections import ConfigDict

VARIANTS = ("residual", "grm", "soup", "ssc", "log_linear")


def get_config(machine: str = "gpu") -> Any:
    """Returns the configuration for a ``"gpu"`` or two cores of a ``"cpu"``."""
    if machine not in ("gpu", "cpu"):
        raise ValueError(f"the part after the colon must be gpu or cpu, got {machine!r}")
    config = ConfigDict()
    rule = "titans" if machine == "gpu" else "ssd"
    config.models = (rule, *(f"{rule}_{variant}" for variant in VARIANTS), "transformer")
    config.lengths = tuple(2**i for i in range(11, 17))  # of training, T
    config.tokens_per_batch = 2**16
    config.histories = tuple(2**i for i in range(11, 17))  # of decoding; () for none
    config.num_layers, config.features, config.num_heads = 4, 1536, 16  # 760m's, but for its depth
    config.vocab_size = 5376  # 32,000 scaled like the layers, so that the head keeps its share
    config.segment, config.top_k = 256, 4
    config.dtype, config.remat = "bfloat16", True
    config.rounds = 10  # timed; the median counts
    config.decode_tokens = 16  # of a round
    # Whether the models of a length take turns: fairer on a noisy machine, but all of them must fit
    # in memory at once.
    config.interleave = False
    if machine == "cpu":
        config.lengths = config.histories = (512, 1024, 2048, 4096)
        config.tokens_per_batch = 4096
        config.num_layers, config.features, config.num_heads = 2, 128, 2
        config.vocab_size = 256
        config.segment = 128
        config.dtype, config.remat = "float32", False
        config.rounds, config.interleave = 5, True
    return config
