#!/usr/bin/env bash
# Deep memories of memory-caching return the same for every query: their weights stay zero.
#
# Expected: after tokens were written to a Titans or DLA memory, a two-layer network, what it returns
# depends on the query, as for the package's linear memory.
# Seen: it does not. init_state makes all weights and biases zero, where gelu(0) = 0 and the second
# layer's weights are the only path to the first: every gradient but the last bias's stays
# zero. So the memory learns a running sum of values, and keys and queries play no part in it.
#
# Software: memory-caching 0.1.0, torch 2.13.0, CPU, Python 3.11. Date: 2026-11-29.
# Output seen:
#   LinearMemoryBackend: reads of two queries differ by 20.77
#   TitansBackend: reads of two queries differ by 0.0, largest weight 0.0
#   DLABackend: reads of two queries differ by 0.0, largest weight 0.0
#   as described
#
# Of use here: experiments/bench_peers times this Titans memory beside ours, and says so in its row;
# ours begins with learned weights (`DeepMemory.init`, memcache_jax/memories/deep.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'memory-caching==0.1.0' 'torch==2.13.0'
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from memory_caching import backends
from memory_caching.config import DLAConfig, TitansConfig

torch.manual_seed(0)
rows = torch.randn(16, 2, 1, 1, 8)
query = torch.randn(1, 1, 8)
memories = [
    backends.LinearMemoryBackend(),
    backends.TitansBackend(TitansConfig()),
    backends.DLABackend(DLAConfig()),
]
found = []
for memory in memories:
    state = memory.init_state(
        batch_size=1, num_heads=1, head_dim=8, device=torch.device("cpu"), dtype=torch.float32
    )
    for key, value in rows:
        state = memory.update(state, key, value)
    differ = float((memory.apply(state, query) - memory.apply(state, -query)).abs().max())
    told = f"{type(memory).__name__}: reads of two queries differ by {round(differ, 2)}"
    if hasattr(state, "weights"):
        told += f", largest weight {max(float(w.abs().max()) for w in state.weights)}"
    print(told)
    found.append(differ)
if found[0] > 0 and found[1:] == [0, 0]:
    print("as described")
else:
    raise SystemExit("this has changed")
PYTHON
