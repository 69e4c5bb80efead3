"""A run so small that it trains in seconds."""

import jax
import pytest

from memcache_jax.training import default_config


@pytest.fixture(scope="session")
def compilation_folder(tmp_path_factory):
    """Where compiled programs are kept, so that each compiles once."""
    return str(tmp_path_factory.mktemp("compilations"))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(compilation_folder):
    """Compiles fast, and once: every run makes its functions anew."""
    jax.config.update("jax_compilation_cache_dir", compilation_folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def corpus_folder(tmp_path):
    """A folder of twelve text files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"{i} apples and {i} pears are {2 * i} fruits. " * (9 + i))
    return folder


@pytest.fixture
def config(corpus_folder):
    """A configuration of an attention model, which compiles fastest, on that folder."""
    config = default_config()
    config.steps, config.batch_size, config.sequence_length = 6, 2, 32
    config.log_every, config.eval_every, config.checkpoint_every = 2, 6, 3
    config.model.update(num_layers=1, features=16, num_heads=2, mlp_features=32)
    config.model.mixers = ("attention",)
    config.data.files = (str(corpus_folder),)
    config.data.heldout_fraction = 0.2
    config.data.heldout_tokens = 128
    config.optimizer.warmup_steps = 2
    config.sample.max_new_tokens = 0
    return config
