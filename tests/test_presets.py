"""The paper's models: their names and sizes, and that each one runs and trains."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn import AttentionMixer, LanguageModel, MemoryCachingMixer
from memcache_jax.presets import NAMES, SIZES, language_model
from memcache_jax.training import model_config, model_options, preset_config
from tests.covers import first_kept

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_describes_every_preset(name):
    for size in SIZES:
        model = language_model(name, size)
        assert model_config(model_options(model)) == model


def test_names():
    for rule in ("swla", "dla", "titans", "samba", "titans_mal"):
        assert {rule, *(f"{rule}_{kind}" for kind in ("residual", "grm", "soup", "ssc"))} < {*NAMES}
        assert f"{rule}_log_linear" in NAMES
    (mixer,) = language_model("dla_ssc", "170m").mixers
    assert isinstance(mixer, MemoryCachingMixer)
    assert isinstance(mixer.memory, mc.memories.DLA)
    assert mixer.aggregation == mc.SSC(top_k=4)
    first, second = language_model("titans_mal_log_linear", "1.3b", segment=64).mixers
    assert isinstance(first, MemoryCachingMixer)
    assert first.segmentation == mc.Logarithmic(64)
    assert second == AttentionMixer(window=2048)
    assert language_model("transformer", "tiny").mixers == (AttentionMixer(),)


@pytest.mark.parametrize(
    ("size", "millions"), [("170m", 170), ("340m", 340), ("760m", 760), ("1.3b", 1300)]
)
def test_sizes(size, millions):
    def parameters(name):
        model = nnx.eval_shape(lambda: LanguageModel(language_model(name, size), rngs=nnx.Rngs(0)))
        return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) / 1e6

    assert abs(parameters("transformer") / millions - 1) < 0.25
    assert parameters("titans_grm") < 1.35 * parameters("transformer")


@pytest.mark.parametrize("name", first_kept(1, ["titans_mal_grm", "swla_log_linear"]))
def test_a_preset_learns_a_little(name):
    config = language_model(name, "tiny", vocab_size=11, segment=64, features=32, num_layers=2)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = jnp.tile(jnp.arange(10), (2, 15))

    @nnx.jit
    def loss_and_gradients(model):
        def loss(model):
            logits = jax.nn.log_softmax(model(tokens[:, :-1]))
            return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()

        return nnx.value_and_grad(loss)(model)

    before, gradients = loss_and_gradients(model)
    step = 0.02 / optax.tree.norm(gradients)
    params = jax.tree.map(lambda p, g: p - step * g, nnx.state(model, nnx.Param), gradients)
    nnx.update(model, params)
    assert loss_and_gradients(model)[0] < before


def test_the_rule_alone_is_one_segment():
    (mixer,) = language_model("titans", "760m").mixers
    assert isinstance(mixer, MemoryCachingMixer)
    assert mixer.segmentation.plan(2**15).num_blocks == 1


@pytest.mark.parametrize(("file", "size"), [(f"lm_{s.replace('.', 'p')}", s) for s in SIZES])
def test_configuration_files(file, size):
    config = importlib.import_module(f"configs.{file}").get_config("dla_grm")
    assert config == preset_config("dla_grm", size)
    assert config.optimizer.learning_rate == SIZES[size].learning_rate
    assert config.data.streams == (1 if size in ("tiny", "170m") else 32)
    assert config.batch_size % config.data.streams == 0
    assert (CONFIGS / f"{file}.py").read_text().count(f"configs/{file}.py") == 1


def test_errors():
    with pytest.raises(ValueError, match=r"name must be one of .*'titans_grm'.* got 'lstm'"):
        language_model("lstm", "tiny")
    with pytest.raises(ValueError, match=r"size must be one of .*'1.3b'.* got '2b'"):
        language_model("titans", "2b")
