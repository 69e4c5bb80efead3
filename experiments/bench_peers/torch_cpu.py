"""Layers of PyTorch packages on a CPU."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from experiments.bench_peers._jobs import Job, Jobs

# None of these is in the environment of type checkers.
torch: Any = import_module("torch")
torch.set_num_threads(1)
torch.manual_seed(0)


def _case(build: Callable[..., Any]) -> Callable[..., Job]:
    """The output and the gradients of a layer's parameters and of its input."""

    def case(length: int, features: int, **sizes: int) -> Job:
        layer = build(features, **sizes)
        x = torch.randn(1, length, features, requires_grad=True)

        def job() -> tuple[int, ...]:
            layer.zero_grad(set_to_none=True)
            x.grad = None
            y = layer(x)
            y = y[0] if isinstance(y, tuple) else y
            (y**2).sum().backward()
            return tuple(y.shape)

        return job

    return case


def _caching(features: int, heads: int, segment: int, backend: str) -> Any:
    """Independent segments; a memory as wide as ours, whose updates have gradients too."""
    package = import_module("memory_caching")
    parts = import_module("memory_caching.backends")
    titans = import_module("memory_caching.config").TitansConfig(
        memory_width=4 * features // heads,
        inner_update_mode="differentiable",
        update_convention="gradient_descent",
    )
    config = package.MCConfig(
        features,
        heads,
        backend,
        titans=titans,
        aggregation="grm",
        segment_size=segment,
        state_init_mode="restart",
    )
    linear = backend == "linear"
    backend = parts.LinearMemoryBackend() if linear else parts.TitansBackend(titans)
    return package.MemoryCachingLayer(config=config, backend=backend)


def _linear(features: int, heads: int, segment: int, **_: int) -> Any:
    return _caching(features, heads, segment, "linear")


def _titans(features: int, heads: int, segment: int, **_: int) -> Any:
    return _caching(features, heads, segment, "titans")


def _neural_memory(features: int, heads: int, chunk: int, **options: int) -> Any:
    memory = import_module("titans_pytorch").NeuralMemory
    return memory(features, chunk, dim_head=features // heads, heads=heads, **options)


def _anchored(features: int, heads: int, chunk: int, **_: int) -> Any:
    """Gradients at the state that each chunk begins with, as ours are."""
    return _neural_memory(features, heads, chunk, batch_size=chunk)


def _first(features: int, heads: int, chunk: int, **_: int) -> Any:
    """Gradients of all chunks at the initial state."""
    return _neural_memory(features, heads, chunk)


def _attention(features: int, heads: int, **_: int) -> Any:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs = torch.nn.Linear(features, 3 * features, bias=False)
            self.output = torch.nn.Linear(features, features, bias=False)

        def forward(self, x: Any) -> Any:
            q, k, v = self.inputs(x).unflatten(-1, (3, heads, -1)).movedim(-2, 1).unbind(3)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.output(y.movedim(1, 2).flatten(2))

    return Attention()


_JOBS = Jobs(
    {
        "linear GRM": _case(_linear),
        "Titans GRM": _case(_titans),
        "Titans, anchored": _case(_anchored),
        "Titans, first": _case(_first),
        "attention": _case(_attention),
    }
)
prepare, seconds = _JOBS.prepare, _JOBS.seconds


def save(path: str, length: int, features: int, heads: int, segment: int) -> None:
    """Writes q, k, v, u of memory-caching's linear GRM and its output before the projection."""
    layer, found = _linear(features, heads, segment), {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            found[name] = inputs[0] if name == "y" else output

        return hook

    for name in "qkvu":
        getattr(layer, f"{name}_proj").register_forward_hook(keep(name))
    layer.o_proj.register_forward_hook(keep("y"))
    with torch.no_grad():
        layer(torch.randn(2, length, features))
    numpy = import_module("numpy")
    numpy.savez(path, **{n: x.unflatten(-1, (heads, -1)).numpy() for n, x in found.items()})
