"""Outputs of every rule but ``Vector``, from data/memory_caching.npz and erasing_rules.npz.

They are 22 tokens in segments of 4, chunks of 2 and SSC's two segments, computed token by token in
float64 by other code than the library's.
"""

import pathlib

import numpy as np

import memcache_jax as mc

DATA = pathlib.Path(__file__).parent / "data"
ARRAYS = dict(np.load(DATA / "memory_caching.npz")) | dict(np.load(DATA / "erasing_rules.npz"))
LENGTH, SEGMENT = 22, 4
DEEP = ("W2", "W1")
# The rule, the array of each control (of its log, where the name says so), those of its weights.
RULES = {
    "linear": (mc.memories.LinearAttention(), {}, ()),
    "retnet": (mc.memories.RetNet(), {"log_gamma": "gamma"}, ()),
    "ssd": (mc.memories.SSD(), {"log_alpha": "alpha", "lam": "lam"}, ()),
    "swla": (mc.memories.SWLA(), {"log_alpha": "alpha", "beta": "beta", "lam": "lam"}, ()),
    "gla": (mc.memories.GLA(), {"log_alpha": "alpha_k"}, ()),
    "deltanet": (mc.memories.DeltaNet(), {"beta": "beta"}, ()),
    "gated_deltanet": (mc.memories.GatedDeltaNet(), {"log_alpha": "alpha", "beta": "beta"}, ()),
    "rwkv7": (mc.memories.RWKV7(), {"log_w": "w", "a": "a", "kappa": "kappa"}, ()),
    "kda": (mc.memories.KDA(), {"log_alpha": "alpha_k", "beta": "beta"}, ()),
    "gdn2": (
        mc.memories.GDN2(),
        {"log_alpha": "alpha_k", "erase": "erase", "write": "write"},
        (),
    ),
    "dla": (
        mc.memories.DLA(chunk_size=2, expansion=2),
        {"log_alpha": "alpha", "eta": "eta"},
        DEEP,
    ),
    "titans": (
        mc.memories.Titans(chunk_size=2, expansion=2),
        {"log_alpha": "alpha", "log_beta": "beta", "eta": "eta"},
        DEEP,
    ),
    "titans_depth1": (
        mc.memories.Titans(chunk_size=2, depth=1),
        {"log_alpha": "alpha", "log_beta": "beta", "eta": "eta"},
        ("W",),
    ),
}


def vector_inputs(rule):
    """The rule, and its arguments of ``memory_caching``: one row and one head."""
    memory, sources, weights = RULES[rule]

    def given(name):
        return ARRAYS[f"in/{name}"]

    controls = {}
    for name, source in sources.items():
        x = np.log(given(source)) if name.startswith("log_") else given(source)
        controls[name] = x[None, :, None] if x.ndim else x[None]
    inputs = {
        name: given(source)[None, :, None]
        for name, source in zip(("query", "key", "value", "connector"), "qkvu", strict=True)
    }
    weights = {name: given(name)[None] for name in weights}
    return memory, dict(inputs, controls=controls, weights=weights)


def assert_agrees(rule, name, y):
    """Asserts that y are the first tokens' outputs of "aggregation/segmentation/start"."""
    wanted = ARRAYS[f"out/{rule}/{name}"][: y.shape[1]]
    np.testing.assert_allclose(y[0, :, 0], wanted, rtol=0, atol=1e-10, err_msg=name)
