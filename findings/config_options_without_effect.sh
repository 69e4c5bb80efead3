#!/usr/bin/env bash
# Options of published recurrent models that their own library reads but ignores.
#
# Expected: KimiLinearConfig(tie_word_embeddings=True) gives a model whose output layer is its
# embedding, as for other families; NemotronHConfig(attention_bias=True) gives its attention biases.
# Seen: both models have the parameters that they have without the option. A reader that believes
# config.json looks for tensors that are not in the file, or finds one too many.
#
# Software: transformers 5.24.0, torch 2.14.1, CPU. Date: 2026-11-28.
# Output seen:
#   kimi_linear tie_word_embeddings: lm_head is the embedding: False
#   nemotron_h tie_word_embeddings: lm_head is the embedding: False
#   nemotron_h attention_bias: biases in attention: []
#   bamba tie_word_embeddings: lm_head is the embedding: True
#   as described
#
# Of use here: memcache_jax/pretrained/families/kimi_linear.py and nemotron_h.py leave these options
# out; tests/pretrained/test_families.py checks it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'transformers==5.24.0' 'torch==2.14.1'
"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import transformers

small = dict(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, pad_token_id=0,
    num_attention_heads=2, num_key_value_heads=2,
)
kimi = dict(
    moe_intermediate_size=8, num_local_experts=4, num_experts_per_tok=2, kv_lora_rank=4,
    qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, linear_head_dim=4, linear_num_heads=2,
    layer_types=["linear_attention", "full_attention"],
)
nemotron = dict(
    layers_block_type=["linear_attention", "full_attention"], head_dim=8, mamba_num_heads=4,
    mamba_head_dim=8, n_groups=1, ssm_state_size=4,
)
bamba = dict(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_state=4)


def build(name, **options):
    config = getattr(transformers, f"{name}Config")(**small, **options)
    return transformers.AutoModelForCausalLM.from_config(config)


def is_tied(model):
    return model.lm_head.weight is model.get_input_embeddings().weight


seen = []
for label, name, options in (
    ("kimi_linear", "KimiLinear", kimi), ("nemotron_h", "NemotronH", nemotron),
    ("bamba", "Bamba", bamba),
):
    tied = is_tied(build(name, tie_word_embeddings=True, **options))
    line = f"{label} tie_word_embeddings: lm_head is the embedding: {tied}"
    seen.append((label != "bamba", tied, line))
biased = build("NemotronH", attention_bias=True, **nemotron)
biases = [
    n for n, _ in biased.named_parameters() if n.endswith(("q_proj.bias", "o_proj.bias"))
]
seen.insert(2, (True, bool(biases), f"nemotron_h attention_bias: biases in attention: {biases}"))
for _, _, line in seen:
    print(line)
if any(has_no_effect == effect for has_no_effect, effect, _ in seen):
    raise SystemExit("this has changed")
print("as described")
PYTHON
