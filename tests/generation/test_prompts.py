"""Token ids that are refused, and sizes of buffers."""

import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.generation.prompts import buffer_size, longest
from tests.generation.models import count_up, language_model


def test_sizes_of_buffers():
    assert [buffer_size(tokens) for tokens in (1, 64, 65, 129)] == [64, 64, 128, 256]
    assert [buffer_size(tokens, 96) for tokens in (1, 64, 65, 96, 97)] == [64, 64, 96, 96, 97]
    assert longest(language_model("listed")) == 96
    assert longest(language_model("titans")) is longest(count_up) is None


def test_ids_without_a_vocabulary_must_be_int32():
    with pytest.raises(ValueError, match=r"prompt must hold .* got 4294967296"):
        mc.generate(count_up, np.array([[2**32]]), 2, temperature=0)
