"""Choice among implementations: by name, and by platform where one was measured to be faster.

Each is imported when it is first called, and one that is missing refuses by name.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from memcache_jax.kernels import _dispatch
from memcache_jax.kernels._dispatch import check_served, choose, implementations
from memcache_jax.kernels.bank_read import bank_read

pytestmark = pytest.mark.usefixtures("every_platform")


def double(x, index, scale):
    return 2 * scale * x[index]


def triple(x, index, scale):
    return 3 * scale * x[index]


def refuse(x, index, scale):
    check_served("op", "pallas_tpu", [(True, "one"), (False, "two"), (True, "three")])


IMPLEMENTATIONS = {"xla": double, "pallas_tpu": triple, "pallas_gpu": refuse}
ARGUMENTS = (jnp.arange(4.0), jnp.array([2, 1]), np.float32(10))


def test_by_name():
    assert choose("op", IMPLEMENTATIONS, None) is double
    assert choose("op", IMPLEMENTATIONS, "pallas_tpu") is triple
    with pytest.raises(ValueError, match="got 'cuda'"):
        choose("op", IMPLEMENTATIONS, "cuda")


def test_every_reason_is_told():
    with pytest.raises(NotImplementedError, match="cannot serve: one; three"):
        choose("op", IMPLEMENTATIONS, "pallas_gpu")(*ARGUMENTS)


@pytest.mark.parametrize(
    ("platform", "best", "factor"),
    [("cpu", "pallas_tpu", 30), ("tpu", "pallas_tpu", 20), ("cpu", "pallas_gpu", 20)],
    ids=["this platform", "another platform", "cannot serve"],
)
def test_the_platform_chooses(monkeypatch, platform, best, factor):
    monkeypatch.setattr(_dispatch, "AUTOMATIC", {"op": {platform: best}})
    function = choose("op", IMPLEMENTATIONS, None)
    x, index, scale = ARGUMENTS
    y, pull = jax.vjp(jax.jit(lambda x: function(x, index, scale)), x)
    np.testing.assert_array_equal(y, factor * x[index])
    np.testing.assert_array_equal(pull(y)[0], jnp.zeros(4).at[index].set(factor * y))


def test_the_platform_is_the_one_compiled_for(monkeypatch):
    monkeypatch.setattr(_dispatch, "AUTOMATIC", {"op": {"tpu": "pallas_tpu"}})
    x, index, scale = ARGUMENTS
    function = jax.jit(lambda x: choose("op", IMPLEMENTATIONS, None)(x, index, scale))
    texts = {
        platform: function.trace(x).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu")
    }
    factors = {
        platform: [factor for factor in (20, 30) if f"{factor / 10}00000e+01" in text]
        for platform, text in texts.items()
    }
    assert factors == {"cpu": [20], "tpu": [30]}


PROGRAM = """
import sys
import flax.nnx

def loaded():
    return {name for name in sys.modules if "pallas" in name or name.endswith((".tpu", ".gpu"))}

of_flax = loaded()
import jax
import jax.numpy as jnp
import memcache_jax as mc
print(loaded() - of_flax)

def loss(x, memory, aggregation, implementation):
    controls = {name: jnp.full((1, 4, 1), -0.5) for name in memory.controls}
    shapes = memory.weight_shapes(2, 2)
    return mc.memory_caching(
        x, x, x, x, controls=controls, weights={n: jnp.ones((1, *s)) for n, s in shapes.items()},
        memory=memory, aggregation=aggregation, segmentation=mc.Constant(2),
        implementation=implementation,
    ).sum()

x = jnp.ones((1, 4, 1, 2))
titans = mc.memories.Titans(chunk_size=2)
for implementation in (None, "xla", "reference"):
    jax.grad(loss)(x, titans, mc.GRM(), implementation)
    jax.grad(loss)(x, mc.memories.SSD(), mc.SSC(top_k=1), implementation)
print(loaded() - of_flax)
"""


@pytest.mark.slow
def test_no_backend_is_loaded_unasked():
    # Flax and JAX load some of Pallas themselves, though none of its backends.
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["set()", "set()", ""]


BACKENDS = {
    "pallas_gpu": ("triton", r"JAX [\d.]+ has no Pallas Triton backend, which JAX 0.12 deprecated"),
    "pallas_tpu": ("tpu", "tpu"),
}


def missing(monkeypatch, implementation):
    """Makes JAX one that does not have an implementation's backend."""
    of_jax = f"jax.experimental.pallas.{BACKENDS[implementation][0]}"
    monkeypatch.setitem(sys.modules, of_jax, None)
    monkeypatch.delattr(pallas, BACKENDS[implementation][0], raising=False)
    for module in ("_triton", "_tpu", "bank_read.gpu", "bank_read.tpu"):
        monkeypatch.delitem(sys.modules, f"memcache_jax.kernels.{module}", raising=False)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_a_missing_backend_refuses_with_its_reason(monkeypatch, implementation):
    _, reason = BACKENDS[implementation]
    x, reads = jnp.ones((1, 1, 1, 2, 2)), np.zeros((1, 1), int)
    missing(monkeypatch, implementation)
    refusal = f"bank_read by '{implementation}' is missing: .*{reason}"
    with pytest.raises(NotImplementedError, match=refusal):
        bank_read(jnp.matmul, (x,), x, x[..., :1], reads, implementation=implementation)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_the_platform_does_without_a_missing_backend(monkeypatch, implementation):
    monkeypatch.setattr(_dispatch, "AUTOMATIC", {"op": {"cpu": implementation}})
    missing(monkeypatch, implementation)
    op = {"xla": double, **implementations("bank_read", implementation)}
    x, index, scale = ARGUMENTS
    np.testing.assert_array_equal(choose("op", op, None)(x, index, scale), 20 * x[index])
