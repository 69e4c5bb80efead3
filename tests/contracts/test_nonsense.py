"""Nonsense for every argument of every public function: an error of ours says what is wanted.

Each argument of a call that is right is replaced in turn by values of all kinds. Calls with arrays
run within one trace, so that nothing is compiled.
"""

import dataclasses
import functools
import inspect
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

import memcache_jax as mc
from memcache_jax.generation.sampling import Sampling
from memcache_jax.memories import Memory
from memcache_jax.serving.http import PLAIN, ChatTemplate, Limits
from memcache_jax.training import default_config, model_config, model_options, preset_config
from memcache_jax.training.config import check_config
from memcache_jax.training.optimizer import make_optimizer
from tests.covers import first_kept

PUBLISHED = Path(__file__).parents[1] / "data" / "pretrained" / "mamba2"
LIBRARY = Path(mc.__file__).resolve().parent
KERNELS = LIBRARY / "kernels"
# Python's own errors, of keywords.
KEYWORDS = re.compile("unexpected keyword|required (positional|keyword)|multiple values|positional")
NONSENSE: tuple[Any, ...] = (
    *(None, True, False, "", "nonsense", b"bytes", (), [], {}, set(), object(), int, lambda: 1),
    *(0, -1, -7, 2**31, 10**30, 0.5, 3.0, -2.5, math.nan, math.inf, -math.inf, 1j),
    *([1, 2], [1, [2, 3]], (1, "x"), [None], {"name": 1}, {1: 2}, range(3)),
    *(np.int64(-3), np.float32("nan"), np.bool_(True), np.str_("x"), np.float64(2.5)),
    *(np.ones((2, 3)), np.ones((2, 16, 2, 8), int), np.array(["a"]), np.array([None, {}])),
    *(np.zeros(0), np.array(math.nan), np.array([-1]), np.array([True, False])),
    *(np.zeros((2, 16), complex), np.dtype("int32"), jnp.bfloat16, "float128", ...),
)


def rows(*shape):
    return np.ones(shape, np.float32)


def core() -> dict[str, Any]:
    """Arguments of ``memory_caching``."""
    memory = mc.memories.Titans(chunk_size=4, expansion=1)
    controls = {name: -rows(2, 16, 2) for name in memory.controls}
    weights = {name: rows(2, *shape) for name, shape in memory.weight_shapes(8, 8).items()}
    names = ("query", "key", "value", "connector")
    return dict(
        **{name: rows(2, 16, 2, 8) for name in names},
        **dict(memory=memory, controls=controls, weights=weights, aggregation=mc.GRM()),
        **dict(segmentation=mc.Constant(8), start="independent", document_ids=None),
        **dict(implementation=None, exchange="gather"),
    )


def language_model_config():
    mixers = (
        mc.nn.MemoryCachingMixer(mc.memories.SSD(), mc.GRM(), mc.Constant(8)),
        mc.nn.AttentionMixer(window=8),
    )
    return mc.nn.LanguageModelConfig(17, 2, features=8, num_heads=2, mlp_features=8, mixers=mixers)


def constructors():
    """Public functions without arrays, and arguments that are right."""
    deep = dict(chunk_size=16, expansion=2, depth=2)
    plan = mc.Constant(8).plan(20)
    mixer = vars(mc.nn.MemoryCachingMixer())
    attention = vars(mc.nn.AttentionMixer(window=8))
    made_config = language_model_config()
    config = {f.name: getattr(made_config, f.name) for f in dataclasses.fields(made_config)}
    for memory in vars(mc.memories).values():
        rule = inspect.isclass(memory) and issubclass(memory, Memory)
        if rule and not inspect.isabstract(memory):
            yield memory, deep if issubclass(memory, mc.memories.DeepMemory) else {}
    yield mc.Constant, dict(size=8)
    yield mc.Logarithmic, dict(size=8)
    yield mc.Lengths, dict(lengths=(8, 16))
    yield mc.Adaptive, dict(min=8, max=16, threshold=0.5, block=4, by="errors")
    yield mc.Adaptive(8, 16).most_states, dict(length=20)
    for segmentation in (
        *(mc.Constant(8), mc.Logarithmic(8), mc.Lengths((8, 16)), mc.Adaptive(8, 16)),
    ):
        yield segmentation.plan, dict(length=20)
        yield segmentation.span, dict(segments=2)
    yield mc.ReadPlan, vars(plan)
    yield mc.Residual, {}
    yield mc.GRM, dict(gate="content", pooling="mean", num_keys=1, exact=2)
    yield mc.Soup, dict(gate="content", pooling="mean", num_keys=1, exact=2)
    yield mc.SSC, dict(gate="content", pooling="mean", num_keys=1, top_k=2, inner="grm", exact=2)
    yield mc.SSC, dict(top_k=2, router=mc.Tree(4, 2))
    yield mc.Tree, dict(branching=4, beam=2)
    yield mc.nn.MemoryCachingMixer, mixer
    yield mc.nn.AttentionMixer, attention
    yield mc.nn.LanguageModelConfig, config
    parts, path = mc.nn.recurrent, mc.nn.recurrent.Path(2, 4, conv_width=3)
    yield mc.nn.Norm, dict(kind="rms", epsilon=1e-6, offset=1.0)
    yield mc.nn.LoRA, dict(rank=4, alpha=8.0)
    yield mc.nn.GatedMLP, vars(mc.nn.GatedMLP(8))
    yield mc.nn.SquaredMLP, dict(hidden=8, use_bias=False)
    yield mc.nn.ChannelMix, dict(hidden=8)
    yield mc.nn.Experts, vars(mc.nn.Experts(4, 2, 8, 8))
    latent = mc.nn.LatentAttentionMixer(2, 4, 2, 4, 8)
    yield mc.nn.LatentAttentionMixer, vars(latent)
    yield mc.nn.ParallelMixer, vars(mc.nn.ParallelMixer(latent, mc.nn.AttentionMixer()))
    yield mc.nn.MemoryAsContextMixer, vars(mc.nn.MemoryAsContextMixer(latent))
    yield mc.nn.GroupedAttentionMixer, vars(mc.nn.GroupedAttentionMixer(4, 2, 8))
    yield mc.nn.BlockConfig, vars(mc.nn.BlockConfig(mc.nn.AttentionMixer(), mc.nn.GatedMLP(8)))
    yield parts.Path, vars(path)
    yield parts.Rate, dict(name="beta", scale=1.0)
    yield parts.TimeStep, dict(least=0.0, most=1.0, scale=1.0, use_bias=False)
    low = parts.LowRank(4)
    yield parts.LowRank, vars(low)
    yield parts.TimeStepDecay, dict(low=low)
    yield parts.LowRankDecay, dict(low=low, divisor=16.0, least=-1.0)
    yield parts.LimitedDecay, dict(low=low, rate=0.5, name="log_w")
    yield parts.InContextRate, dict(low=low, epsilon=1e-6)
    yield parts.FixedDecay, dict(rates=(0.5, 1.0), name="log_gamma")
    yield parts.ForgetGate, dict(least=0.5)
    delta: dict[str, Any] = dict(memory=mc.memories.DeltaNet())
    yield parts.Declared, delta
    yield parts.Trapezoid, dict(rates=True, turns=True)
    yield parts.Output, vars(parts.Output())
    caches: dict[str, Any] = dict(aggregation=mc.GRM(), segmentation=mc.Constant(8))
    caches |= dict(heads=2, head_dim=4, start="independent", implementation=None, exchange="gather")
    yield parts.lightning_attention, caches | dict(decay_scale=1.0)
    yield parts.hgrn2, caches | dict(least=0.5)
    yield parts.mamba3, caches | dict(state_dim=4, groups=1, rope_base=1e4)
    yield parts.titans_block, caches | delta | dict(conv_width=4)
    made = parts.RecurrentMixer(mc.memories.DeltaNet(), path, path, path, (parts.Rate(),))
    yield parts.RecurrentMixer, vars(made)
    yield mc.pretrained.load, dict(folder=PUBLISHED, dtype="float32", param_dtype="float32")
    yield mc.presets.mixers, dict(name="titans_ssc", segment=8, top_k=2)
    yield (
        mc.presets.language_model,
        dict(name="titans_ssc", size="tiny", segment=8, vocab_size=17, mlp_features=0),
    )
    yield preset_config, dict(name="titans_ssc", size="tiny")
    yield model_options, dict(model=mc.presets.language_model("titans", "tiny"))
    yield mc.sharding.make_mesh, dict(sizes=dict(data=-1), slices=1, devices=jax.devices())
    for axis in mc.sharding.AXES:
        yield (lambda size, axis=axis: mc.sharding.make_mesh({axis: size})), dict(size=-1)
    yield mc.PrefixStore, dict(max_bytes=10**6)
    yield Limits, vars(Limits(new_tokens=5))
    yield ChatTemplate, dict(source=PLAIN, tokens={"bos_token": "<s>"})
    yield mc.NGrams, dict(tokens=4, longest=2)
    yield Sampling, dict(temperature=1.0, top_k=3, top_p=0.5)


def calls():
    """Public functions of arrays, and arguments that are right; within a trace."""
    whole = core()
    names = ("memory", "aggregation", "segmentation", "start")
    rule: dict[str, Any] = {name: whole[name] for name in names}
    tokens = {name: whole[name] for name in ("query", "key", "value", "connector", "controls")}
    cached = rule | dict(weights=whole["weights"], max_segments=3, max_length=None)
    bounds = dict(policy="error", dtype="float32", cache_dtype=None, placement="device", rewind=0)
    sizes = dict(batch=2, heads=2, key_dim=8, value_dim=8, sharding=None)
    scores = dict(segmentation=mc.Adaptive(8, 8, by="scores"), border=rows(2, 16, 2))
    yield mc.memory_caching, whole | scores
    yield mc.init_cache, sizes | cached | bounds
    cache = mc.init_cache(2, 2, 8, 8, **cached)
    yield (
        mc.extend,
        dict(cache=cache, lengths=None, weights=whole["weights"])
        | tokens
        | rule
        | dict(border=None),
    )
    yield cache.reset, dict(rows=np.array([True, False]))
    yield cache.take, dict(rows=np.array([1, 0]))
    yield mc.init_cache(2, 2, 8, 8, **cached, rewind=2).rewind, dict(tokens=np.array([0, 0]))

    host: dict[str, Any] = dict(use_bias=False, kernel_init=nnx.initializers.zeros)
    host |= dict(qkv_features=8, num_kv_heads=2)
    host |= dict(dropout_rate=0.0, decode=False, kernel_metadata={}, qkv_dot_general=None)
    made: dict[str, Any] = dict(in_features=8, num_heads=2, head_dim=4, dtype=None)
    made |= dict(param_dtype=jnp.float32, axis_names=None, **host)
    layers: dict[str, Any] = dict(connector="learned", distances=4, conv_width=4)
    layers |= rule | dict(implementation=None, exchange="gather")
    rngs = nnx.Rngs(0)
    yield (lambda **options: mc.nn.MemoryCaching(**options, rngs=rngs)), made | layers
    attention = dict(window=8, rope_base=1e4, implementation=None)
    yield (lambda **options: mc.nn.Attention(**options, rngs=rngs)), made | attention

    x: dict[str, Any] = dict(x=rows(2, 16, 8), document_ids=None, inputs_v=None, inputs_k=None)
    x |= dict(cache=None, segment_ids=None, positions=None, mask=None, is_causal=None, decode=None)
    options: dict[str, Any] = dict(batch_size=2, max_length=32, sharding=None, max_segments=None)
    options |= dict(policy="error", cache_dtype=None, placement="device", rewind=0)
    for layer in (
        mc.nn.MemoryCaching(8, 2, **rule, rngs=rngs),
        mc.nn.Attention(8, 2, window=8, rngs=rngs),
    ):
        yield layer, x
        yield layer.init_cache, options
        yield layer.extend, dict(x=x["x"], cache=layer.init_cache(2, 32), lengths=None)
    model = mc.nn.LanguageModel(language_model_config(), rngs=rngs)
    ids = dict(tokens=np.ones((2, 16), np.int32))
    yield (lambda config: mc.nn.LanguageModel(config, rngs=rngs)), dict(config=model.config)
    yield model, ids | dict(document_ids=None, cache=None, segment_ids=None, positions=None)
    yield model.logits, dict(hidden=rows(2, 16, 8))
    yield model.hidden, ids | dict(document_ids=None)
    scored: dict[str, Any] = dict(hidden=rows(2, 16, 8), targets=np.ones((2, 16), int))
    yield model.token_scores, scored
    yield mc.nn.token_scores, scored | dict(matrix=rows(8, 17), scale=0.5)
    scored |= dict(weights=None, z_loss=1e-4)
    yield model.cross_entropy, scored
    yield mc.nn.cross_entropy, scored | dict(matrix=rows(8, 17), scale=0.5)
    yield model.gates, ids
    yield model.init_cache, options
    streams = model.init_cache(2, 32)
    yield model.extend, ids | dict(cache=streams, lengths=None)
    yield mc.nn.cache_table, dict(model=model, cache=streams, tokens=10)
    yield mc.nn.cache_bytes, dict(cache=streams)
    mesh = mc.sharding.make_mesh(dict(data=-1))
    yield mc.sharding.batch_sharding, dict(mesh=mesh)
    yield mc.sharding.param_shardings, dict(state=nnx.state(model), mesh=mesh)
    yield streams.reset, dict(rows=np.array([True, False]))
    yield streams.take, dict(rows=np.array([1, 0]))
    yield (
        mc.nn.with_memory_caching,
        dict(model=model, segmentation=mc.Constant(8), aggregation=mc.Residual()),
    )
    yield mc.nn.with_lora, dict(model=model, rank=2, alpha=4.0, rngs=nnx.Rngs(0))
    yield mc.nn.merge_lora, dict(model=model)
    routed: dict[str, Any] = rule | dict(aggregation=mc.SSC(1))
    router = mc.nn.MemoryCaching(8, 2, **routed, rngs=rngs)
    yield mc.nn.with_router_noise, dict(model=router, key=jax.random.key(0), scale=0.5)
    yield (
        mc.Decoder,
        dict(model=model, batch_size=2, max_length=32, temperature=0.5, top_k=3, top_p=0.5)
        | dict(key=jax.random.key(0), cache=dict(policy="error")),
    )
    for name, value in dict(max_segments=3, policy="error", cache_dtype="int8").items():

        def with_option(value, name=name):
            return mc.Decoder(model, max_length=32, temperature=0, cache={name: value})

        yield with_option, dict(value=value)
    yield (
        mc.generate,
        dict(model=reached, prompt=np.ones((2, 4), int), max_new_tokens=3, lengths=None)
        | dict(
            temperature=0.5, top_k=3, top_p=0.5, stop_token=2, key=jax.random.key(0), cache=None
        ),
    )


def reached(tokens):
    """A model for calls that are right up to it."""
    raise ValueError(f"the model was called with {tokens.shape}")


class Tally:
    """Makes calls, and keeps what is raised that is not ours."""

    def __init__(self) -> None:
        self.made, self.refused, self.foreign = 0, 0, []

    def call(self, function: Any, arguments: dict[str, Any], what: str) -> None:
        self.made += 1
        try:
            function(**arguments)
        except (ValueError, NotImplementedError, TypeError) as error:
            self.refused += 1
            if not is_ours(error):
                self.foreign.append(f"{what}: {type(error).__name__}: {error}"[:300])
        except Exception as error:
            self.foreign.append(f"{what}: {type(error).__name__}: {error}"[:300])

    def replace_each(self, function: Any, right: dict[str, Any], every: int = 1) -> None:
        """Calls with each argument replaced by nonsense, left out, and with one too many."""
        label = getattr(function, "__qualname__", type(function).__name__)
        for i, name in enumerate(right):
            for value in NONSENSE[i % every :: every]:
                self.call(function, right | {name: value}, f"{label}({name}={value!r:.60})")
            fewer = {other: right[other] for other in right if other != name}
            self.call(function, fewer, f"{label} without {name}")
        self.call(function, right | {"nonsense": 1}, f"{label}(nonsense=1)")

    def check(self, more_than):
        """Asserts that so many calls were made, most of them refused, and none by others."""
        assert not self.foreign, "\n".join(self.foreign)
        assert self.made > more_than, self.made
        assert self.refused > 0.8 * self.made, self.refused


def is_ours(error: Exception) -> bool:
    """Whether the library raised the error itself, or Python for the names of arguments."""
    if isinstance(error, TypeError):
        return KEYWORDS.search(str(error)) is not None
    frame: Any = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    file = Path(frame.tb_frame.f_code.co_filename).resolve()
    return file == Path(__file__) or LIBRARY in file.parents or KERNELS.resolve() in file.parents


def leaves(config, path=()):
    """The paths of all keys of a configuration, those of its parts too."""
    for key in config:
        yield (*path, key)
        if isinstance(config[key], ConfigDict):
            yield from leaves(config[key], (*path, key))


@pytest.mark.usefixtures("unchecked")
def test_configurations():
    """Each key of a configuration in turn."""
    tally = Tally()
    for i, (*parts, key) in enumerate(leaves(default_config())):
        for value in (*NONSENSE[i % 2 :: 2], leaves):
            plain = default_config().to_dict()
            part = functools.reduce(dict.__getitem__, parts, plain)
            part[key] = value
            if value is leaves:
                del part[key]
            config: Any = ConfigDict(plain)

            def build(config=config):
                check_config(config)
                model_config(config.model)
                make_optimizer(config.optimizer, config.steps)

            tally.call(build, {}, f"{'.'.join((*parts, key))} = {value!r:.60}")
    tally.check(more_than=1500)


@pytest.mark.usefixtures("unchecked")
def test_constructors():
    tally = Tally()
    for function, right in constructors():
        function(**right)
        tally.replace_each(function, right)
    tally.check(more_than=2000)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("every", "more_than"), first_kept(1, [(12, 500), (3, 2000)]))
def test_calls(every, more_than):
    tally = Tally()

    def inside():
        for function, right in calls():
            tally.replace_each(function, right, every)

    jax.eval_shape(inside)
    tally.check(more_than)


@pytest.mark.usefixtures("unchecked")
def test_serving(tmp_path, monkeypatch):
    """Methods of a batcher and a store, which take a prompt and compute nothing."""
    monkeypatch.chdir(tmp_path)  # some nonsense is a name of a file
    model, tally = mc.nn.LanguageModel(language_model_config(), rngs=nnx.Rngs(0)), Tally()
    batcher = mc.Batcher(model, rows=1, max_length=24, most_waiting=10**6)
    asked: dict[str, Any] = dict(prompt=[1, 2], max_new_tokens=3, temperature=0.5, top_k=3)
    asked |= dict(top_p=0.5, seed=1, stop_tokens=(3,), stop_texts=(), logprobs=2)
    batcher.submit(**asked, score_prompt=True, on_token=print)
    tally.replace_each(batcher.submit, asked | dict(score_prompt=True, on_token=print))
    store, empty = mc.PrefixStore(10**6), model.init_cache(1, 24)
    assert store.insert([], empty)
    tally.replace_each(store.insert, dict(tokens=[], cache=empty))
    tally.replace_each(store.match, dict(tokens=[1, 2]))
    # More tokens than the cache holds: always refused, before anything is compiled.
    long = dict(model=model, tokens=np.ones(30, int), empty=empty, every=8)
    tally.replace_each(store.prefill, long)
    tally.replace_each(store.save, dict(path="no folder/store.npz"))
    tally.replace_each(mc.PrefixStore.load, dict(path="none.npz", like=empty, max_bytes=10**6))
    tally.check(more_than=800)
