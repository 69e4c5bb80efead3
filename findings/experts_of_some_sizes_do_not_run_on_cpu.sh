#!/usr/bin/env bash
# Sparse experts whose width is no multiple of 4 do not run in float32 on a CPU, unless one says how.
#
# Expected: Qwen3NextConfig(moe_intermediate_size=14), which takes any size, gives a model whose forward
# pass runs, as it does with 12.
# Seen: RuntimeError, "strides should be multiple of 16 bytes", from torch's grouped product, which
# the library chooses by default on CPUs too. After model.set_experts_implementation("eager"), or
# "batched_mm", the same model runs.
#
# Software: transformers 5.24.0, torch 2.13.0, CPU. Date: 2026-11-29.
# Output seen:
#   12 grouped_mm: runs, eager: runs, batched_mm: runs
#   14 grouped_mm: strides should be multiple of 16 bytes, eager: runs, batched_mm: runs
#   by default: grouped_mm
#   as described
#
# Of use here: ours computes experts in blocks of rows and takes any size;
# tests/nn/test_experts.py has experts of 6 channels.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'transformers==5.24.0' 'torch==2.13.0'
"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM


def model(size):
    torch.manual_seed(0)
    return Qwen3NextForCausalLM(Qwen3NextConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, head_dim=8, num_attention_heads=2,
        num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=size, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )).eval()


def outcome(model, how):
    model.set_experts_implementation(how)
    try:
        with torch.no_grad():
            model(torch.arange(12)[None])
    except RuntimeError as e:
        return str(e).splitlines()[0]
    return "runs"


seen = {}
for size in (12, 14):
    made = model(size)
    seen[size] = {how: outcome(made, how) for how in ("grouped_mm", "eager", "batched_mm")}
    print(size, ", ".join(f"{how}: {what}" for how, what in seen[size].items()))
default = model(14).config._experts_implementation
print("by default:", default)
fails = "strides should be multiple of 16 bytes"
runs = dict(grouped_mm="runs", eager="runs", batched_mm="runs")
if (seen, default) != ({12: runs, 14: runs | dict(grouped_mm=fails)}, "grouped_mm"):
    raise SystemExit("this has changed")
print("as described")
PYTHON
