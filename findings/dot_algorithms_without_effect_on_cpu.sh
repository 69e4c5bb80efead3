#!/usr/bin/env bash
# On a CPU, JAX's dot algorithms of lower precision neither round nor fail.
#
# Expected: jax.lax.dot(x, y, precision="BF16_BF16_F32") of float32 arrays rounds the operands to
# bfloat16, or, as DotAlgorithm's documentation says of an algorithm that a platform does not
# support, raises when it is compiled.
# Seen: the compiled program still names the algorithm (dot_bf16_bf16_f32), and the product has the
# precision of float32. So a test on a CPU says nothing about a kernel's precision on a TPU or GPU.
#
# Software: jax 0.10.2 and 0.12.0.1 (Python 3.12), CPU. Date: 2026-11-29.
# Output seen (jax 0.10.2; 0.12.0.1 alike):
#   operands rounded by hand: error 2e-03
#   BF16_BF16_F32: error 5e-07, named in the compiled program: True
#   BF16_BF16_F32_X3: error 5e-07, named in the compiled program: True
#   as described
#
# Of use here: docs/write_your_own_memory.md says so about interpreted kernels.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "jax==${JAX_VERSION:-0.10.2}"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import functools

import jax
import jax.numpy as jnp
import numpy as np

x = jax.random.normal(jax.random.key(0), (64, 4096))
y = jax.random.normal(jax.random.key(1), (4096, 64))


def product(x, y):
    return np.asarray(x, np.float64) @ np.asarray(y, np.float64)


def error(z):
    return np.abs(z - exact).max() / np.abs(exact).max()


exact = product(x, y)
by_hand = error(product(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)))
print(f"operands rounded by hand: error {by_hand:.0e}")
for name in ("BF16_BF16_F32", "BF16_BF16_F32_X3"):
    dot = jax.jit(functools.partial(jax.lax.dot, precision=name)).lower(x, y).compile()
    seen, named = error(np.asarray(dot(x, y), np.float64)), f"dot_{name.lower()}" in dot.as_text()
    print(f"{name}: error {seen:.0e}, named in the compiled program: {named}")
    assert seen < 1e-5 < by_hand and named, "this has changed"
print("as described")
PYTHON
