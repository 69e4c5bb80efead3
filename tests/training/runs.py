"""What two runs are compared by."""

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from memcache_jax.training.metrics import read_metrics


def rows(workdir):
    """The metrics without those that a clock decides."""
    return [
        {key: value for key, value in row.items() if key != "tokens_per_second"}
        for row in read_metrics(workdir)
    ]


def assert_same_params(first, second):
    jax.tree.map(
        np.testing.assert_array_equal,
        ocp.load(str(first / "params")),
        ocp.load(str(second / "params")),
    )
