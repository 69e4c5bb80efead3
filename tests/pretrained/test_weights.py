"""Tensors of a folder's files, read one by one or by rows."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from memcache_jax.pretrained.weights import Weights


def test_rows_of_a_tensor_and_the_whole(tmp_path):
    value = np.arange(24, dtype=np.float32).reshape(6, 4).astype(ml_dtypes.bfloat16)
    save_file({"a": value, "b": np.ones(3)}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    assert weights.names == {"a", "b"}
    assert weights.shape("a") == (6, 4)
    for _ in range(2):  # before and after the files are closed
        np.testing.assert_array_equal(weights.read("a"), value)
        np.testing.assert_array_equal(weights.read("a", slice(2, 5)), value[2:5])
        assert weights.read("a").dtype == value.dtype
        weights.close()
    with pytest.raises(ValueError, match="has no tensor 'c'"):
        weights.read("c")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of maps")
def test_closed_files_are_not_part_of_the_memory(tmp_path):
    save_file({"a": np.ones(1 << 20)}, tmp_path / "model.safetensors")

    def is_mapped():
        with open("/proc/self/maps") as file:
            return str(tmp_path) in file.read()

    weights = Weights(tmp_path)
    assert not is_mapped()
    read = weights.read("a")
    assert is_mapped()
    weights.close()
    assert not is_mapped()
    assert read.sum() == 1 << 20
