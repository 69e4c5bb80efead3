"""The speed of serving: every part says its times and ratios."""

import json
import subprocess
import sys

import pytest

CONFIG = """
from memcache_jax.training import default_config


def get_config():
    config = default_config()
    config.model.num_layers, config.model.features, config.model.num_heads = 1, 16, 2
    config.model.vocab_size = {vocab}
    config.model.segmentation.size = config.model.memory.chunk_size = 16
    return config
"""


def bench(folder, vocab, *flags):
    (folder / "small.py").write_text(CONFIG.format(vocab=vocab))
    command = [sys.executable, "-m", "experiments.bench_serving", f"--config={folder}/small.py"]
    sizes = ["--rows=2", "--prompt=8", "--new=6", "--long=40", "--rounds=1"]
    return subprocess.run(
        [*command, *sizes, *flags], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_small(tmp_path):
    done = bench(tmp_path, 257, f"--json={tmp_path}/table.json")
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in table] == [
        *("batcher", "one after the other", "one call") * 2,
        *("known", "cold", "one call", "one by one", "n-grams", "plain"),
    ]
    for row in table:
        assert f"{row['name']:28} {row['seconds']:10.3f} {row['processor']:10.3f}" in done.stdout
    assert done.stdout.count("equal tokens: True") == 3
    small = bench(tmp_path, 99)
    assert small.returncode == 1
    assert "error: prompts are bytes, got a vocabulary of 99" in small.stderr
