"""Numbers in Prometheus' text format."""

import bisect
import itertools
from collections.abc import Iterable, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Counter:
    """A number that grows, for each set of labels.

    Args:
      name: without the suffix ``_total``.
      about: a line of help.
      labels: names of labels.
    """

    def __init__(self, name: str, about: str, labels: Sequence[str] = ()) -> None:
        self.name, self.about, self.labels = name, about, tuple(labels)
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, amount: float = 1, *labels: object) -> None:
        """Adds to the number with these values of labels."""
        key = tuple(map(str, labels))
        self._values[key] = self._values.get(key, 0) + amount

    def lines(self) -> list[str]:
        """The text."""
        rows = [
            f"{self.name}_total{_braces(zip(self.labels, key, strict=True))} {_number(value)}"
            for key, value in sorted(self._values.items())
        ]
        return [*_head(f"{self.name}_total", self.about, "counter"), *rows]


class Histogram:
    """How many observations were at most as large as each bound.

    Args:
      name: with its unit.
      about: a line of help.
      bounds: of the buckets.
    """

    def __init__(self, name: str, about: str, bounds: Sequence[float] = SECONDS) -> None:
        self.name, self.about, self.bounds = name, about, tuple(bounds)
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Takes an observation."""
        self._counts[bisect.bisect_left(self.bounds, value)] += 1
        self._sum += value

    def lines(self) -> list[str]:
        """The text."""
        counts = list(itertools.accumulate(self._counts))
        bounds = [*map(_number, self.bounds), "+Inf"]
        rows = [
            f"{self.name}_bucket{_braces([('le', bound)])} {count}"
            for bound, count in zip(bounds, counts, strict=True)
        ]
        ends = [f"{self.name}_sum {_number(self._sum)}", f"{self.name}_count {counts[-1]}"]
        return [*_head(self.name, self.about, "histogram"), *rows, *ends]


def gauge(name: str, about: str, value: float) -> list[str]:
    """The text of a number that goes up and down."""
    return [*_head(name, about, "gauge"), f"{name} {_number(value)}"]


class Metrics:
    """What the server counts."""

    def __init__(self) -> None:
        self.requests = Counter(
            "memcache_http_requests", "Requests by path and status.", ("path", "status")
        )
        self.ends = Counter("memcache_choices", "Choices by how they ended.", ("finish_reason",))
        self.prompt_tokens = Counter("memcache_prompt_tokens", "Tokens of prompts.")
        self.known_tokens = Counter(
            "memcache_known_prompt_tokens", "Tokens of prompts that the prefix store knew."
        )
        self.new_tokens = Counter("memcache_new_tokens", "Tokens generated.")
        self.first = Histogram(
            "memcache_time_to_first_token_seconds", "From a request to a choice's first token."
        )
        self.whole = Histogram("memcache_choice_seconds", "From a request to a choice's end.")

    def text(self, gauges: Sequence[tuple[str, str, float]]) -> str:
        """All of it, and gauges: name, help and value."""
        lines = [line for metric in vars(self).values() for line in metric.lines()]
        lines += [line for each in gauges for line in gauge(*each)]
        return "\n".join(lines) + "\n"


def _head(name: str, about: str, kind: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]


def _braces(pairs: Iterable[tuple[str, str]]) -> str:
    told = [f'{name}="{_escaped(value)}"' for name, value in pairs]
    return f"{{{','.join(told)}}}" if told else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
