"""Compares public models with their own library: logits, speed and memory.

    pip install torch transformers==5.24.0 '.[pretrained]'
    python -m experiments.published

For each tiny model of the tests, ``mc.pretrained.save`` writes what ``load`` has read, transformers
reads that, and the logits of both are compared. Then tiny Qwen3.5 and a made-up one of 200M
parameters read a prompt and decode by both libraries in turn, on the same cores, and a table says
where ours spends the time of reading.

``--parts=memory`` makes up a Qwen3.5 of 2 GiB in bfloat16, and reads it in a process of its own,
whose largest resident memory it prints; also that of transformers, if it is installed.
"""

import functools
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

import memcache_jax as mc
from experiments._program import run
from memcache_jax.nn.language_model import abstract_model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.read import described

_DATA = Path(__file__).parents[1] / "tests" / "data"
FOLDERS, PUBLISHED = _DATA / "pretrained", _DATA / "published"
_PROMPT = flags.DEFINE_integer("prompt", 512, "Tokens of the prompt that is timed.")
_NEW = flags.DEFINE_integer("new", 64, "Tokens that are decoded after it.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Times of each, in turn; the median counts.")
_PARTS = flags.DEFINE_list(
    "parts", ["logits", "tiny", "200M"], "What to do, of these three and memory."
)

# Reads a folder, and prints the bytes of the parameters, of the largest one, and of the resident
# memory before the read and at its peak, which has the parts of files that are mapped too.
_READ = """
import sys
import jax
from flax import nnx
import memcache_jax as mc

def resident(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))

jax.devices()
before = resident("VmRSS")
model = jax.block_until_ready(nnx.state(mc.pretrained.load(sys.argv[1]), nnx.Param))
sizes = [x.nbytes for x in jax.tree.leaves(model)]
print(sum(sizes), max(sizes), before, resident("VmHWM"))
"""
_THEIRS = """
import sys
import torch, transformers

def resident(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))

before = resident("VmRSS")
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
sizes = [x.numel() * x.element_size() for x in model.parameters()]
for x in model.parameters():  # which are parts of the mapped file until they are read
    x.sum()
print(sum(sizes), max(sizes), before, resident("VmHWM"))
"""


def program() -> None:
    """Prints the tables."""
    if "memory" in _PARTS.value:
        _memory()
    if set(_PARTS.value) <= {"memory"}:
        return
    torch, transformers = _load("torch"), _load("transformers")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {jax.__version__=}")
    if "logits" in _PARTS.value:
        print(f"{'model':<20} {'error of the largest logit':>28}")
        for folder in [*sorted(FOLDERS.iterdir()), *sorted(PUBLISHED.iterdir())]:
            if not folder.name.startswith("fla_"):  # read by flash-linear-attention alone
                print(f"{folder.name:<20} {_error(folder):28.1e}")
    for size in [part for part in _PARTS.value if part not in ("logits", "memory")]:
        with tempfile.TemporaryDirectory() as made:
            folder = FOLDERS / "qwen3_5_text"
            if size != "tiny":
                folder = _make(Path(made) / "model")
            _time(size, folder)
            _profile(folder)


def _error(folder: Path) -> float:
    """The difference of both libraries' logits, relative to the largest."""
    torch = _load("torch")
    model = mc.pretrained.load(folder)
    with tempfile.TemporaryDirectory() as made:
        saved = Path(made) / "saved"
        mc.pretrained.save(model, saved)
        theirs = _theirs(saved)
        with np.load(folder / "expected.npz") as file:
            tokens = file["tokens"]
        with torch.no_grad():
            wanted = theirs(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()
    got = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens)))
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def _theirs(folder: Path) -> Any:
    return _load("transformers").AutoModelForCausalLM.from_pretrained(folder).eval()


def _make(folder: Path) -> Path:
    """A Qwen3.5 of 200M parameters with random weights, as its library saves it."""
    config = _load("transformers.models.qwen3_5.configuration_qwen3_5").Qwen3_5TextConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        linear_num_key_heads=8,
        linear_num_value_heads=8,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        tie_word_embeddings=True,
    )
    _load("transformers").AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _time(size: str, folder: Path) -> None:
    """Prints tokens per second of both libraries, and their ratio."""
    torch = _load("torch")
    length, new = _PROMPT.value, _NEW.value
    theirs = _theirs(folder)
    model = mc.pretrained.load(folder, scan_layers=False)  # decodes faster on CPUs
    parameters = sum(p.numel() for p in theirs.parameters())
    ids = np.random.default_rng(0).integers(3, 97, (1, length))
    tokens, prompt = torch.tensor(ids, dtype=torch.long), jnp.asarray(ids)

    def read_theirs() -> Any:
        with torch.no_grad():
            return theirs(tokens, use_cache=True, logits_to_keep=1)

    def decode_theirs() -> float:
        with torch.no_grad():
            out = read_theirs()
            started = time.perf_counter()
            past, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            for _ in range(new):
                out = theirs(token, past_key_values=past, use_cache=True)
                past, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            return time.perf_counter() - started

    @jax.jit
    def read(model: mc.nn.LanguageModel, prompt: jax.Array) -> Any:
        hidden, cache = model.extend(prompt, model.init_cache(1, length + new))
        return jnp.argmax(model.logits(hidden[:, -1:]), axis=-1), cache

    @jax.jit
    def decode(model: mc.nn.LanguageModel, token: jax.Array, cache: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            token, cache = carry
            hidden, cache = model.extend(token, cache)
            return (jnp.argmax(model.logits(hidden), axis=-1), cache), None

        return jax.lax.scan(step, (token, cache), None, new)[0]

    def read_ours() -> Any:
        return jax.block_until_ready(read(model, prompt))

    def decode_ours() -> float:
        token, cache = read_ours()
        started = time.perf_counter()
        jax.block_until_ready(decode(model, token, cache))
        return time.perf_counter() - started

    def clocked(f: Callable[[], Any]) -> float:
        started = time.perf_counter()
        f()
        return time.perf_counter() - started

    kinds: dict[str, Callable[[], float]] = {
        "prefill, ours": lambda: clocked(read_ours),
        "prefill, theirs": lambda: clocked(read_theirs),
        "decode, ours": decode_ours,
        "decode, theirs": decode_theirs,
    }
    for time_one in kinds.values():
        time_one()
    taken = {name: [] for name in kinds}
    for _ in range(_ROUNDS.value):
        for name, time_one in kinds.items():
            taken[name].append(time_one())
    print(f"{size}: {parameters:,} parameters, a prompt of {length} tokens, {new} decoded")
    for what, count in (("prefill", length), ("decode", new)):
        ours, other = (
            count / statistics.median(taken[f"{what}, {who}"]) for who in ("ours", "theirs")
        )
        print(
            f"  {what:<8} ours {ours:10,.1f} tokens/s, theirs {other:10,.1f}, {ours / other:.2f}x"
        )


def _profile(folder: Path) -> None:
    """Prints how long the parts of a pass over the prompt take, each as a program of its own."""
    model = mc.pretrained.load(folder, scan_layers=False)
    tokens = jax.random.randint(jax.random.key(0), (1, _PROMPT.value), 3, 97)

    def median(f: Callable[..., Any], *args: Any) -> float:
        run, taken = jax.jit(f), []
        for _ in range(2 * _ROUNDS.value + 1):
            started = time.perf_counter()
            jax.block_until_ready(run(*args))
            taken.append(time.perf_counter() - started)
        return 1e3 * statistics.median(taken[1:])

    x = jax.random.normal(jax.random.key(1), (1, _PROMPT.value, model.config.features))
    blocks = [jax.tree.map(lambda x: x[0], block) for block in model.layers.blocks]
    rows, seen = [("the whole pass", 1, median(lambda m, t: m.hidden(t), model, tokens))], set()
    for block in blocks:
        name, mixer = type(block.mixer).__name__, block.mixer
        if name in seen:
            continue
        seen.add(name)
        count = sum(type(other.mixer).__name__ == name for other in blocks)
        rows.append((name, count, median(lambda mixer, x: mixer(x), mixer, x)))
        if isinstance(mixer, mc.nn.recurrent.Recurrent):
            operands = mixer.operands(x)
            core = functools.partial(mc.memory_caching, **mixer._rules)
            rows.append(
                ("  its memory alone", count, median(functools.partial(_called, core), operands))
            )
    rows.append(("MLP", len(blocks), median(lambda mlp, x: mlp(x), blocks[0].mlp, x)))
    print(f"  {'part':<22} {'times':>5} {'ms each':>9} {'ms':>9}")
    for name, count, each in rows:
        print(f"  {name:<22} {count:>5} {each:9.2f} {count * each:9.1f}")


def _called(f: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    return f(**arguments)


def _memory() -> None:
    """Prints what reading a model of 2 GiB takes of a process's memory."""
    readers = {"ours": _READ}
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        readers["transformers"] = _THEIRS
    with tempfile.TemporaryDirectory() as made:
        folder = _make_large(Path(made) / "model")
        columns = ("parameters", "largest", "before", "peak", "more")
        print(f"{'MiB':<14}", *(f"{name:>10}" for name in columns))
        for name, code in readers.items():
            command = [sys.executable, "-c", code, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            figures = [int(x) >> 20 for x in done.stdout.split()[-4:]]
            figures.append(figures[3] - figures[2])
            print(f"{name:<14}", *(f"{x:10,}" for x in figures), flush=True)


def _make_large(folder: Path) -> Path:
    """A Qwen3.5 of 1.07 billion parameters in bfloat16, with random weights."""
    given = json.loads((FOLDERS / "qwen3_5_text" / "config.json").read_text()) | dict(
        vocab_size=100_000,
        hidden_size=1536,
        intermediate_size=4608,
        num_hidden_layers=24,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=12,
        linear_num_value_heads=24,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    dtypes = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    graph, state = abstract_model(described(Given(given), **dtypes))
    random = np.random.default_rng(0)
    for _, param in nnx.to_flat_state(state):
        param.set_value(random.random(param.shape, np.float32).astype(param.dtype))
    model = nnx.merge(graph, state)
    model.published = json.dumps(given)
    mc.pretrained.save(model, folder)
    return folder


def _load(name: str) -> Any:
    """A package that this project does not need."""
    return importlib.import_module(name)


if __name__ == "__main__":
    run(program)
