"""docs/public_models.md: its code, and what it says of families."""

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.pretrained.families import family_of
from memcache_jax.pretrained.given import read_given
from memcache_jax.pretrained.read import described
from tests.pretrained.test_read import FOLDERS, expected

PAGE = (Path(__file__).parents[2] / "docs" / "public_models.md").read_text()


@pytest.mark.slow
def test_its_code_gives_perplexity_with_and_without_caches_and_adapters(tmp_path):
    code = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(code) == PAGE.count("```python") == 2
    tokens, logits = expected("mamba2")
    tuned = tmp_path / "tuned"
    names: dict[str, Any] = dict(folder=FOLDERS / "mamba2", tokens=tokens, tuned=tuned)
    exec(compile("\n".join(code), "public_models.md", "exec"), names)
    before, after = names["before"], names["after"]
    assert before.shape == after.shape == (tokens.shape[1] - 1,)
    np.testing.assert_allclose(before[:16], after[:16], rtol=1e-4)
    assert np.abs(before[16:] - after[16:]).max() > 1e-3
    likely = logits[:, :-1] - np.log(np.exp(logits[:, :-1]).sum(-1, keepdims=True))
    loss = -np.take_along_axis(likely, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(before, np.exp(loss.mean(0)), rtol=1e-4)
    assert names["losses"][2] < names["losses"][1] < names["losses"][0]
    after = names["perplexity_by_position"](mc.pretrained.load(tuned), tokens)
    assert np.log(after).mean() < np.log(before).mean()


def test_it_names_the_families_that_are_served():
    table = PAGE[PAGE.index("| `model_type`") : PAGE.index("The tests hold")]
    assert set(re.findall(r"`(\w+)`", table)) - {"model_type"} == set(mc.pretrained.FAMILIES)


@pytest.mark.parametrize("name", ["kimi_linear", "nemotron_h"])
def test_options_that_their_library_does_not_act_on(name):
    """Their heads are never the embedding, and Nemotron-H's attention has no biases."""
    given = read_given(FOLDERS / name)
    changed = given.replaced(tie_word_embeddings=True)
    if name == "nemotron_h":
        changed = changed.replaced(attention_bias=True)
    dtypes = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    assert described(changed, **dtypes) == described(given, **dtypes)
    assert [x.names for x in family_of(changed).tensors(changed)] == [
        x.names for x in family_of(given).tensors(given)
    ]
