#!/usr/bin/env bash
# A hybrid RWKV-7 whose configuration flash-linear-attention accepts cannot be called.
#
# Expected: RWKV7Config(attn={"layers": [0, 1], ...}) gives a model of attention layers that runs, as
# the option does for the library's other models.
# Seen: ValueError, not enough values to unpack (expected 4, got 3). RWKV7Block takes four values from
# its mixer, the last of them the first layer's values; Attention.forward returns three.
#
# Software: flash-linear-attention 0.6.0, transformers 5.24.0, torch 2.14.1, CPU; flash_attn and the
# rotary kernel, which need a GPU, are stubs. Date: 2026-11-29.
# Output seen:
#   not enough values to unpack (expected 4, got 3)
#   as described
#
# Of use here: memcache_jax/pretrained/families/rwkv7.py reads such files as the library's code would
# run if attention handed on the first layer's values; tests/pretrained/test_families.py checks it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'flash-linear-attention==0.6.0' 'transformers==5.24.0' 'torch==2.14.1'
"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import importlib.machinery
import sys
import types

import torch
import transformers  # noqa: F401  # before the stub, which it would look up

stub = types.ModuleType("flash_attn")
stub.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
stub.flash_attn_func = lambda query, key, value, **options: query
stub.flash_attn_varlen_func = None
sys.modules["flash_attn"] = stub
from fla.layers import attn  # noqa: E402
from fla.models import RWKV7Config, RWKV7ForCausalLM  # noqa: E402

attn.RotaryEmbedding.forward = lambda self, query, key, **options: (query, key)
config = RWKV7Config(
    hidden_size=32, num_hidden_layers=2, head_dim=16, vocab_size=64, fuse_norm=False,
    fuse_cross_entropy=False, attn={"layers": [0, 1], "num_heads": 2},
)
model = RWKV7ForCausalLM(config).eval()
try:
    model(torch.ones((1, 4), dtype=torch.long), use_cache=False)
except ValueError as error:
    print(error)
    if "expected 4, got 3" in str(error):
        print("as described")
        raise SystemExit
raise SystemExit("this has changed")
PYTHON
