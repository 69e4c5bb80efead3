"""The study of speed: what its rows say, and a case that does not fit in memory."""

import contextlib
import math

import pytest

from configs import throughput as configs
from experiments import throughput
from experiments._study import Study
from memcache_jax.nn import AttentionMixer


@pytest.fixture
def config():
    """Two models, small."""
    config = configs.get_config("cpu")
    config.models = ("linear_ssc", "transformer")
    config.lengths, config.tokens_per_batch = (16,), 64
    config.histories, config.decode_tokens = (32, 128), 4
    config.num_layers, config.features, config.num_heads = 1, 8, 1
    config.vocab_size, config.segment, config.top_k, config.rounds = 17, 8, 1, 2
    return config


@pytest.mark.slow
def test_rows_and_files(config, tmp_path, capsys):
    with contextlib.closing(Study(tmp_path, config)) as study:
        throughput.program(config, study)
        rows = study.measure(throughput.groups(config), lambda cases: pytest.fail("measured again"))
    assert [(row["what"], row["tokens"], row["name"]) for row in rows] == [
        (what, tokens, name)
        for what, tokens in (("train", 16), ("decode", 32), ("decode", 128))
        for name in config.models
    ]
    for row in rows:
        tokens = 64 if row["what"] == "train" else 1
        assert math.isclose(row["tokens_per_second"] * row["ms"] / 1e3, tokens)
        assert row["compile_seconds"] > 0
    held = {(row["name"], row["tokens"]): row["cache_bytes"] for row in rows[2:]}
    keys_and_values = 2 * 4 * 8  # bytes of a token: float32, 8 features
    of_attention = held["transformer", 128] - held["transformer", 32]
    assert of_attention == (128 - 32) * keys_and_values
    # A state of 8 x 8 and a pooled key for every segment of 8 tokens.
    of_segments = held["linear_ssc", 128] - held["linear_ssc", 32]
    assert of_segments >= (128 - 32) // 8 * 4 * (8 * 8 + 8)
    assert (tmp_path / "throughput.png").stat().st_size > 1000
    assert "| decode | 128" in (tmp_path / "table.md").read_text()
    assert "6 of 6 cases" in capsys.readouterr().out


@pytest.mark.slow
def test_what_does_not_fit_is_a_row_and_the_others_are_measured(config):
    config.lengths, config.tokens_per_batch, config.histories = (2**22,), 2**22, ()
    config.models, config.rounds = ("transformer",), 1
    ((too_long,),) = throughput.groups(config)
    short = too_long | dict(tokens=16, batch=1)
    first, second = throughput.measure([too_long, short])
    assert first["error"] == "out of memory"
    assert "ms" not in first
    assert second["ms"] > 0
    assert throughput.table([too_long | first])[0][3:5] == ["out of memory", "-"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lengths=(24,)), "lengths must divide tokens_per_batch=64, got 24"),
        (dict(histories=(11,)), "room for the 12 tokens that are timed, got 11"),
        (dict(rounds=0), "rounds must be at least 1, got 0"),
    ],
)
def test_errors(config, changes, message):
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        throughput.groups(config)


def test_cudnn_is_for_bfloat16_on_a_gpu(config):
    case = dict(throughput.groups(config)[0][1])
    assert case["attention"] == "xla"
    assert throughput.model_of(case).mixers == (AttentionMixer(),)
    case["attention"] = "cudnn"
    assert throughput.model_of(case).mixers == (AttentionMixer(implementation="cudnn"),)
