"""flash-linear-attention's rules on an NVIDIA GPU."""

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from experiments.bench_peers._jobs import Job, Jobs

# It is not in the environment of type checkers.
torch: Any = import_module("torch")


_RULES = {
    "GatedDeltaNet": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "KDA": ("fla.ops.kda", "chunk_kda"),
}


def _arrays(case: str, length: int, heads: int, dim: int) -> list[Any]:
    """Random q, k, v in bfloat16, and decays and betas in float32."""

    def normal(*shape: int) -> Any:
        return torch.randn(1, length, heads, *shape, device="cuda")

    q, k, v = (x.to(torch.bfloat16) for x in (normal(dim), _unit(normal(dim)), normal(dim)))
    decay = -0.1 * torch.sigmoid(normal(dim) if case == "KDA" else normal())
    return [x.requires_grad_() for x in (q, k, v, decay, torch.sigmoid(normal()))]


def _unit(x: Any) -> Any:
    return torch.nn.functional.normalize(x, dim=-1)


def _run(case: str, arrays: list[Any]) -> Any:
    package, function = _RULES[case]
    return getattr(import_module(package), function)(*arrays, scale=1.0)[0]


def _case(case: str) -> Callable[..., Job]:
    """The output and the gradients of all arrays."""

    def make(**sizes: int) -> Job:
        arrays = _arrays(case, **sizes)

        def job() -> tuple[int, ...]:
            y = _run(case, arrays)
            torch.autograd.grad((y.float() ** 2).sum(), arrays)
            torch.cuda.synchronize()
            return tuple(y.shape)

        return job

    return make


_JOBS = Jobs({case: _case(case) for case in _RULES}, time.perf_counter)
prepare, seconds = _JOBS.prepare, _JOBS.seconds


def save(path: str, case: str, **sizes: int) -> None:
    """Writes the arrays of a rule and its output, in float32."""
    names, arrays = ("query", "key", "value", "log_alpha", "beta"), _arrays(case, **sizes)
    with torch.no_grad():
        found = dict(zip(names, arrays, strict=True)) | dict(y=_run(case, arrays))
    numpy = import_module("numpy")
    numpy.savez(path, **{name: x.detach().float().cpu().numpy() for name, x in found.items()})
