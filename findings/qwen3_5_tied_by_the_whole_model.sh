#!/usr/bin/env bash
# The text model of a Qwen3.5 that ties its output layer gets a random one from its own library.
#
# Expected: Qwen3_5Config(tie_word_embeddings=True) gives a model of text and images whose text model,
# saved and read by AutoModelForCausalLM, has the same logits for the same tokens.
# Seen: different logits. The whole model ties as its own configuration says; the text model asks
# text_config, which has its default, False, and initializes a random output layer. The loading
# report says "lm_head.weight MISSING". With tie_word_embeddings=True in text_config too, as in
# Qwen's own files, the logits are equal.
#
# Software: transformers 5.24.0, torch 2.13.0, CPU. Date: 2026-11-29.
# Output seen:
#   text_config ties: False, the same logits: False
#   text_config ties: True, the same logits: True
#   as described
#
# Of use here: memcache_jax/pretrained/forms.py ties what the whole model ties;
# tests/pretrained/test_forms.py checks it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'transformers==5.24.0' 'torch==2.13.0'
"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import tempfile

import torch
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

text = dict(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8,
    num_attention_heads=2, num_key_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_num_value_heads=2, linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
vision = dict(
    depth=1, hidden_size=8, intermediate_size=8, num_heads=2, patch_size=2, spatial_merge_size=1,
    temporal_patch_size=1, out_hidden_size=16, num_position_embeddings=4,
)
tokens, same = torch.arange(12)[None], {}
for said in (False, True):
    config = Qwen3_5Config(
        text_config=text | dict(tie_word_embeddings=said), vision_config=vision,
        tie_word_embeddings=True,
    )
    whole = Qwen3_5ForConditionalGeneration(config).eval()
    with tempfile.TemporaryDirectory() as saved, torch.no_grad():
        whole.save_pretrained(saved)
        read = AutoModelForCausalLM.from_pretrained(saved).eval()
        same[said] = torch.allclose(whole(tokens).logits, read(tokens).logits)
    print(f"text_config ties: {said}, the same logits: {same[said]}")
if same != {False: False, True: True}:
    raise SystemExit("this has changed")
print("as described")
PYTHON
