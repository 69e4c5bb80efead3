"""Public models beside their own library: the same logits, and how fast each is.

    pip install torch transformers==5.24.0 'memcache_jax[pretrained]'
    python -m experiments.published

For each tiny model of the tests, ``mc.pretrained.save`` writes what ``load`` has read, transformers
reads that, and the logits of both are compared. Then tiny Qwen3.5 and a made-up one of 200M
parameters read a prompt and decode by both libraries in turn, on the same cores, and a table says
where ours spends the time of reading.
"""

import functools
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import memcache_jax as mc
from experiments._program import run

FOLDERS = Path(__file__).parents[1] / "tests" / "data" / "pretrained"
_PROMPT = flags.DEFINE_integer("prompt", 512, "Tokens of the prompt that is timed.")
_NEW = flags.DEFINE_integer("new", 64, "Tokens that are decoded after it.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Times of each, in turn; the median counts.")
_PARTS = flags.DEFINE_list("parts", ["logits", "tiny", "200M"], "What to do, of these three.")


def program() -> None:
    """Prints both tables."""
    torch, transformers = _load("torch"), _load("transformers")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {jax.__version__=}")
    if "logits" in _PARTS.value:
        print(f"{'model':<20} {'error of the largest logit':>28}")
        for folder in sorted(FOLDERS.iterdir()):
            if not folder.name.startswith("fla_"):  # read by flash-linear-attention alone
                print(f"{folder.name:<20} {_error(folder):28.1e}")
    for size in [part for part in _PARTS.value if part != "logits"]:
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


def _load(name: str) -> Any:
    """A package that this project does not need."""
    return importlib.import_module(name)


if __name__ == "__main__":
    run(program)
