#!/usr/bin/env bash
# OLMo-hybrid with rope_parameters = None has rotary positions, though its code says None means none.
#
# Expected: OlmoHybridConfig(rope_parameters=None) is a model without rotary positions. The model's
# code skips them where config.rope_parameters is None, and its comment says that released
# checkpoints set it to None.
# Seen: the configuration replaces None by the default, a base of 10,000, so the model has rotary
# positions and different logits. Only a rope_theta of None within rope_parameters leaves them out.
#
# Software: transformers 5.24.0, torch 2.13.0, CPU. Date: 2026-11-29.
# Output seen:
#   rope_parameters=None: rotary positions, base 10000.0
#   rope_theta=None: no rotary positions
#   None has the logits of base 10,000: True, of no positions: False
#   as described
#
# Of use here: memcache_jax/pretrained/families/olmo_hybrid.py reads both as transformers does;
# tests/pretrained/test_forms.py checks it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'transformers==5.24.0' 'torch==2.13.0'
"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import torch
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

small = dict(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, linear_num_key_heads=2, linear_num_value_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    layer_types=["linear_attention", "full_attention"],
)


def logits(**rope):
    torch.manual_seed(0)
    model = OlmoHybridForCausalLM(OlmoHybridConfig(**small, **rope)).eval()
    with torch.no_grad():
        return model, model(torch.arange(3, 40)[None]).logits


none, from_none = logits(rope_parameters=None)
off, without = logits(rope_parameters=dict(rope_type="default", rope_theta=None))
_, with_base = logits(rope_parameters=dict(rope_type="default", rope_theta=10_000.0))
assert none.model.rotary_emb is not None and off.model.rotary_emb is None, "this has changed"
base = none.config.rope_parameters["rope_theta"]
print(f"rope_parameters=None: rotary positions, base {base}")
print("rope_theta=None: no rotary positions")
same = torch.allclose(from_none, with_base), torch.allclose(from_none, without)
print(f"None has the logits of base 10,000: {same[0]}, of no positions: {same[1]}")
assert same == (True, False) and base == 10_000, "this has changed"
print("as described")
PYTHON
