"""What every test runs under: 8 CPU devices, strict ranks, checked shapes."""

import gc
import importlib.metadata
import os

import jaxtyping

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs run for milliseconds and compile for seconds: do not optimize them. Newer versions have
# not the last flag, which saves a third of that time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10.")
)

import jax
import pytest

# Traces are millions of objects that live: looking through all of them takes a tenth of the time.
gc.set_threshold(100_000, 50, 100)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# From here on, every module of the library checks its annotations at each call. An int passes for
# a float.
jaxtyping.install_import_hook(
    "memcache_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs():
    """Frees the programs of one module before the next: each holds dozens of memory maps.

    A process has 65,530 maps by default, and the compiler crashes when there are no more.
    """
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def one_platform():
    """Traces the branch of a CPU alone where the library has one for each platform."""
    from tests.cases import scheduled

    with scheduled("in_turn"):
        yield


@pytest.fixture
def every_platform():
    """Traces the branches of all platforms, as users do."""
    from tests.cases import scheduled

    with scheduled(None):
        yield


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked():
    """No check of annotations for one test: for arguments that our own errors must catch."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The workdir of a language model that has learned a sentence, ``runs/demo`` in a folder."""
    from memcache_jax.training import default_config, train

    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").mkdir()
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text("the cat sat on the mat. " * 30)
    config = default_config()
    config.steps, config.batch_size, config.sequence_length = 60, 2, 32
    config.log_every = config.eval_every = config.checkpoint_every = 60
    config.model.update(num_layers=1, features=16, num_heads=2, mlp_features=32)
    config.model.memory = {"name": "LinearAttention"}
    config.model.segmentation.size = 8
    config.data.files = (str(folder / "text"),)
    config.data.heldout_fraction, config.data.heldout_tokens = 0.3, 64
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-2, 1
    config.sample.max_new_tokens = 0
    train(config, folder / "runs" / "demo")
    return folder / "runs" / "demo"
