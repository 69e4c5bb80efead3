"""Generation: greedy and sampled continuations, the stop token, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.covers import first_kept
from tests.generation.models import VOCAB, count_up, language_model, prompts


@pytest.mark.slow
def test_greedy_is_the_argmax_of_the_prefix_again_and_again():
    model, tokens = language_model(), prompts(length=16)  # a segment
    got = mc.generate(model, tokens, 2, temperature=0)
    assert got.dtype == jnp.int32
    forward = nnx.jit(lambda model, tokens: model(tokens))
    for _ in range(2):
        # A length of its own at every step, and nothing behind the last token.
        following = jnp.argmax(forward(model, tokens)[:, -1:], axis=-1)
        tokens = jnp.concatenate([tokens, following], axis=1)
    np.testing.assert_array_equal(got, tokens)


@pytest.mark.parametrize(
    ("mixer", "length", "new"),
    first_kept(1, [("linear attention", 1, 63), ("attention", 60, 8)]),
)
def test_greedy_is_the_argmax_everywhere(mixer, length, new):
    model, tokens = language_model(mixer), prompts(length=length)
    got = mc.generate(model, tokens, new, temperature=0)
    assert got.shape == (3, length + new)
    np.testing.assert_array_equal(got[:, :length], tokens)
    # The model is causal, so that one pass tells what follows every prefix.
    following = jnp.argmax(nnx.jit(lambda model, tokens: model(tokens))(model, got), axis=-1)
    np.testing.assert_array_equal(got[:, length:], following[:, length - 1 : -1])
    assert len(np.unique(got[:, length:])) > 3, "the continuation is too simple to tell anything"


def test_one_trace_for_equal_buffer_lengths():
    traces = []

    def model(tokens):
        traces.append(tokens.shape)
        return count_up(tokens)

    for length, new, temperature in [(5, 3, 1.0), (7, 50, 0.5), (5, 3, 1.0)]:
        prompt = jnp.zeros((2, length), jnp.int32)
        mc.generate(model, prompt, new, temperature=temperature, key=jax.random.key(length))
    assert traces == 2 * [(2, 64)]  # for the prompt and for the tokens after it
    mc.generate(model, prompt, 61, key=jax.random.key(0))
    assert traces == 2 * [(2, 64)] + 2 * [(2, 128)]
    for stops in ([], 3, [3, 1], [1, 2, 3], range(8)):
        mc.generate(model, prompt, 61, key=jax.random.key(0), stop_token=stops)
    assert len(traces) == 4


@pytest.mark.slow
def test_an_updated_model_is_read_anew():
    model, tokens = nnx.clone(language_model()), prompts()
    before = mc.generate(model, tokens, 8, temperature=0)
    model.head.kernel[...] = -model.head.kernel[...]
    assert (mc.generate(model, tokens, 8, temperature=0) != before).any()


def test_rows_are_filled_with_the_stop_token_after_it():
    prompt = jnp.array([[1, 2], [0, 7], [8, 4]])
    got = mc.generate(count_up, prompt, 5, temperature=0, stop_token=4)
    # 4 in a prompt stops nothing.
    assert got.tolist() == [
        [1, 2, 3, 4, 4, 4, 4],
        [0, 7, 8, 9, 0, 1, 2],
        [8, 4, 5, 6, 7, 8, 9],
    ]


@pytest.mark.slow
def test_several_stop_tokens():
    got = mc.generate(count_up, np.array([[1], [5]]), 5, temperature=0, stop_token=[4, 7])
    assert got.tolist() == [[1, 2, 3, 4, 4, 4], [5, 6, 7, 7, 7, 7]]


@pytest.mark.parametrize("mixer", first_kept(1, ["titans", "attention"]))
def test_rows_of_their_own_lengths(mixer):
    model, tokens, lengths = language_model(mixer), prompts(length=20), np.array([20, 1, 13])
    got = np.asarray(mc.generate(model, tokens, 20, lengths=lengths, temperature=0, stop_token=0))
    following = jnp.argmax(nnx.jit(lambda model, tokens: model(tokens))(model, got), axis=-1)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(got[row, :length], tokens[row, :length])
        new, rest = np.split(got[row, length:], [20])
        wanted = np.array(following[row, length - 1 : length + 19])
        wanted[np.cumsum(wanted == 0) > 0] = 0  # the stop token, and what follows it
        np.testing.assert_array_equal(new, wanted)
        np.testing.assert_array_equal(rest, 0)


@pytest.mark.slow
def test_a_cache_of_a_language_model_and_none_agree():
    model, tokens = language_model(), prompts()
    options: dict[str, Any] = dict(temperature=0.8, key=jax.random.key(2))
    graph, state = nnx.split(model)
    anew = mc.generate(lambda tokens: nnx.merge(graph, state)(tokens), tokens, 30, **options)
    np.testing.assert_array_equal(mc.generate(model, tokens, 30, **options), anew)


@pytest.mark.slow
def test_bounded_memory():
    model = language_model()
    options: dict[str, Any] = dict(temperature=0, cache=dict(max_segments=1, policy="drop_oldest"))
    short, long = (mc.generate(model, prompts(), new, **options) for new in (20, 40))
    full = mc.generate(model, prompts(), 40, temperature=0)
    np.testing.assert_array_equal(short, full[:, :25])  # the first two segments see all
    np.testing.assert_array_equal(long[:, :25], short)
    # Without a policy there is room for two segments: the last token is drawn, and not taken.
    options["cache"] = dict(max_segments=1)
    np.testing.assert_array_equal(mc.generate(model, prompts(), 28, **options), full[:, :33])
    with pytest.raises(ValueError, match=r"room for 32 .* of 5 and max_new_tokens=29 need 33"):
        mc.generate(model, prompts(), 29, **options)
    # Only what a row takes counts, not the width of all.
    wide = jnp.pad(prompts(), ((0, 0), (0, 25)))
    lengths = jnp.full(len(wide), 5)
    alike = mc.generate(model, wide, 28, lengths=lengths, **options)
    np.testing.assert_array_equal(alike[:, :33], full[:, :33])
    with pytest.raises(ValueError, match=r"is for an nn\.LanguageModel"):
        mc.generate(count_up, prompts(), 2, **options)


@pytest.mark.slow
def test_as_many_tokens_as_listed_segments_hold():
    model, tokens = language_model("listed"), prompts(batch=1, length=20)
    got = mc.generate(model, tokens, 77, temperature=0)
    following = jnp.argmax(nnx.jit(lambda model, tokens: model(tokens))(model, got[:, :96]), -1)
    np.testing.assert_array_equal(got[:, 20:], following[:, 19:])
    with pytest.raises(ValueError, match="hold 96 tokens, got 97"):
        mc.generate(model, tokens, 78, temperature=0)


@pytest.mark.slow
def test_generation_ends_when_all_rows_have_stopped():
    steps = []

    def model(tokens):
        jax.debug.callback(lambda: steps.append(1))
        return count_up(tokens)

    got = mc.generate(model, jnp.array([[1], [2]]), 40, temperature=0, stop_token=5)
    jax.effects_barrier()
    assert got[0].tolist() == [1, 2, 3, 4] + [5] * 37
    assert got[1].tolist() == [2, 3, 4] + [5] * 38
    assert len(steps) == 4


def test_same_key_same_tokens_and_another_key_others():
    model, tokens = language_model(), prompts()
    one, again, other = (
        mc.generate(model, tokens, 20, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    np.testing.assert_array_equal(one[:, :5], tokens)


@pytest.mark.slow
def test_rows_do_not_depend_on_later_rows():
    model, tokens, key = language_model(), prompts(), jax.random.key(3)
    together = mc.generate(model, tokens, 10, key=key)
    first = mc.generate(model, tokens[:2], 10, key=key)
    np.testing.assert_array_equal(together[:2], first)


@pytest.mark.slow
def test_bfloat16_logits():
    def model(tokens):
        return count_up(tokens).astype(jnp.bfloat16)

    got = mc.generate(model, np.array([[1, 2], [3, 4]]), 2, temperature=0)
    assert got.tolist() == [[1, 2, 3, 4], [3, 4, 5, 6]]


@pytest.mark.slow
def test_inside_jit():
    generate = jax.jit(lambda prompt: mc.generate(count_up, prompt, 3, temperature=0))
    assert generate(jnp.array([[4]])).tolist() == [[4, 5, 6, 7]]


@pytest.mark.slow
def test_in_float64(x64):
    got = mc.generate(language_model(), prompts(), 4, key=jax.random.key(0), top_p=0.9)
    assert got.dtype == jnp.int32


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (np.zeros((1, 3)), {}, r"integers of shape \(b, t\), got float64 \(1, 3\)"),
        (np.zeros((1, 3), bool), {}, "integers .* got bool"),
        (np.zeros(3, int), {}, r"integers of shape \(b, t\), got int64 \(3,\)"),
        (np.zeros((1, 0), int), {}, r"prompt must not be empty, got shape \(1, 0\)"),
        (np.zeros((0, 2), int), {}, r"prompt must not be empty, got shape \(0, 2\)"),
        (np.array([[1, VOCAB]]), {}, "prompt must hold .* 0 to 22, got 23"),
        (np.array([[-1, 2]]), {}, "prompt must hold .* 0 to 22, got -1"),
        (None, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (None, {"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1"),
        (None, {"temperature": float("nan")}, "temperature .* got nan"),
        (None, {"temperature": float("inf")}, "temperature .* got inf"),
        (None, {"top_k": 0}, "top_k must be at least 1, got 0"),
        (None, {"lengths": np.array([5, 6, 1])}, r"lengths must be 1 to 5, .* got \[5, 6, 1\]"),
        (None, {"lengths": np.array([5])}, r"lengths must be integers \(b,\) = \(3,\), got"),
        (None, {"cache": {"max_segments": 2, "policy": "forget"}}, "policy must be one of"),
        (None, {"cache": {"segments": 2}}, r"no options \['segments'\]; it has \['max_segments'"),
        (None, {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        (None, {"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        (None, {"stop_token": VOCAB}, "stop_token must hold .* got 23"),
        (None, {"stop_token": [1, VOCAB]}, "stop_token must hold .* got 23"),
        (None, {"stop_token": -1}, "stop_token must hold .* got -1"),
        (None, {"key": None}, r"temperature 1.0 needs key=jax.random.key"),
    ],
)
def test_what_is_refused(prompt, options, message):
    options = {"max_new_tokens": 2, "key": jax.random.key(0)} | options
    with pytest.raises(ValueError, match=message):
        mc.generate(language_model(), prompts() if prompt is None else prompt, **options)


@pytest.mark.usefixtures("unchecked")
def test_a_model_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"return logits \(b, t, vocab\) .* got shape \(1, 9\)"):
        mc.generate(lambda tokens: jnp.zeros((1, 9)), np.ones((1, 1), int), 2, temperature=0)
