"""Token ids that are refused."""

import numpy as np
import pytest

import memcache_jax as mc
from tests.generation.models import count_up


def test_ids_without_a_vocabulary_must_be_int32():
    with pytest.raises(ValueError, match=r"prompt must hold .* got 4294967296"):
        mc.generate(count_up, np.array([[2**32]]), 2, temperature=0)
