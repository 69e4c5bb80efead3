"""Needles in haystacks: RULER's single needles (arXiv:2404.06654) as text, and a light version."""

import itertools
import pydoc_data.topics
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._fit import Questions, Source
from memcache_jax._typing import Array

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ASKS = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
_QUESTION = "\nWhat is the special magic number for {key} mentioned in the provided text? "
_ANSWER = "The special magic number for {key} mentioned in the provided text is"
_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_QUALITIES = "amber brisk calm dusty eager faint gentle hollow ivory jolly keen lucid mellow noble"
_THINGS = "anchor basket candle desert engine forest garden harbor island jacket kettle lantern"


class Needle(NamedTuple):
    """A prompt and the value that must follow it."""

    prompt: str
    value: str


def essay() -> list[str]:
    """Returns the words of Python's own help texts, prose that every installation has."""
    return " ".join(pydoc_data.topics.topics.values()).split()


def needle(
    task: int,
    length: int,
    depth: float,
    *,
    count: Callable[[str], int],
    random: np.random.RandomState,
    prose: Sequence[str],
) -> Needle:
    """Returns a sample of S-NIAH with the longest haystack of whole words that fits.

    Args:
      task: 1 for sentences of noise and 7 digits; 2 for prose and 7 digits; 3 for prose and a UUID.
      length: maximum tokens of the prompt, a space and the value.
      depth: position of the needle, from 0 (the beginning) to 1.
      count: returns the number of tokens of a text.
      random: draws the key, the value, and the start of the prose.
      prose: the words of a long text.

    Raises:
      ValueError: for an unknown task, a depth out of range, or a length too short for a haystack.
    """
    if task not in (1, 2, 3):
        raise ValueError(f"task must be 1, 2 or 3, got {task}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth}")
    key = "-".join(random.choice(words.split()) for words in (_QUALITIES, _THINGS))
    value = str(random.randint(10**6, 10**7))
    if task == 3:
        value = str(uuid.UUID(bytes=random.bytes(16), version=4))
    # Noise comes in lines, as in RULER; words of prose are joined by spaces.
    words: Sequence[str] = NOISE.split()
    ends = {len(words) - 1: "\n"}
    if task > 1:
        words, ends = prose, {}
    begin = 0 if task == 1 else random.randint(len(words))

    def prompt(size: int) -> str:
        hay = [words[(begin + i) % len(words)] for i in range(size)]
        glue = [ends.get((begin + i) % len(words), " ") for i in range(size)]
        # After the first sentence that ends at the depth or later.
        place = int(depth * size)
        while 0 < place < size and not hay[place - 1].endswith("."):
            place += 1
        text = [
            "".join(itertools.chain(*zip(hay[a:b], glue[a:b], strict=True)))
            for a, b in ((0, place), (place, size))
        ]
        inside = f"{text[0]}{_NEEDLE.format(key=key, value=value)} {text[1]}".rstrip()
        question = (_QUESTION + _ANSWER).format(key=key)
        return f"{_ASKS}{inside}{question}"

    def fits(size: int) -> bool:
        return count(f"{prompt(size)} {value}") <= length

    if not fits(1):
        raise ValueError(f"a needle of task {task} does not fit into {length} tokens")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Needle(prompt(low), value)


def found(needles: Sequence[Needle], continuations: Sequence[str]) -> float:
    """Returns the share of continuations that contain their needle's value, ignoring case."""
    hits = [
        needle.value.lower() in text.lower()
        for needle, text in zip(needles, continuations, strict=True)
    ]
    return sum(hits) / len(hits)


LITE_VOCABULARY = 128
_DIGITS = 4


def lite(length: int, depth: float | None = None) -> Source:
    """Returns a source of light needles: a letter and four digits, hidden in noise.

    A row of ASCII is ``NOISE`` from a random position on, with ``#kdddd`` somewhere in it (a random
    letter k and digits d), and once more at its end, where the digits are the answers.

    Args:
      length: tokens of a row.
      depth: position of the needle, from 0 to 1; None for random ones.

    Raises:
      ValueError: if the length is too short, or the depth out of range.
    """
    noise = np.frombuffer(NOISE.encode() + b" ", np.uint8).astype(np.int32)
    mark, size = ord("#"), 2 + _DIGITS
    room = length - 2 * size
    if room < 1:
        raise ValueError(f"length must be above {2 * size}, got {length}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth}")

    def source(key: Array) -> Questions:
        of_phase, of_letter, of_digits, of_place = jax.random.split(key, 4)
        phase = jax.random.randint(of_phase, (), 0, len(noise))
        letter = jax.random.randint(of_letter, (1,), ord("a"), ord("z") + 1)
        digits = jax.random.randint(of_digits, (_DIGITS,), ord("0"), ord("9") + 1)
        place = jax.random.randint(of_place, (), 0, room + 1)
        if depth is not None:
            place = jnp.asarray(round(depth * room))
        needle = jnp.concatenate([jnp.full(1, mark), letter, digits])
        hay = jnp.asarray(noise)[(phase + jnp.arange(length)) % len(noise)]
        tokens = jax.lax.dynamic_update_slice(hay, needle, (place,))
        tokens = tokens.at[-size:].set(needle)
        places = length - _DIGITS - 1 + jnp.arange(_DIGITS)
        return Questions(tokens, places, digits)

    return source
