"""A trained language model with the interface of lm-evaluation-harness."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import memcache_jax as mc
from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.generation.prompts import buffer_size, longest
from memcache_jax.training.tokenizers import Tokenizer, added_text

_SHORT = 32  # continuations up to this length have a program of their own
_SAMPLING = {"do_sample", "temperature", "top_k", "top_p"}


class _Row(NamedTuple):
    """The tokens that the model reads, and the last ones that it must predict."""

    tokens: list[int]
    targets: list[int]


class TrainedLM(TemplateLM):
    """A language model that answers the requests of ``lm_eval.simple_evaluate``.

    Requests are sorted by length, padded to powers of two from 64, and run in batches of one size,
    so that each length is compiled once. Logits are computed for continuations only, a piece at a
    time (``mc.nn.token_scores``).

    Args:
      model: the model.
      tokenizer: its tokenizer.
      max_length: maximum number of tokens that the model reads; a longer context loses its first
        ones.
      batch_size: rows per batch.
      truncate: which part of a too long prompt is dropped for generation: the "left" end or the
        "middle".

    Raises:
      ValueError: for sizes below 1.
    """

    def __init__(
        self,
        model: mc.nn.LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int = 8,
        truncate: Literal["left", "middle"] = "left",
    ) -> None:
        super().__init__()
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.max_length, self.batch_size, self.truncate = max_length, batch_size, truncate
        self._model, self._tokenizer = model, tokenizer
        self._most = min(max_length, longest(model) or max_length)
        self._graph, self._state = nnx.split(model)

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token, which replaces an empty context."""
        return self._tokenizer.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the ids of a text, without special tokens."""
        return self._tokenizer.encode(string.encode(errors="replace")).tolist()

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of ids."""
        return self._tokenizer.decode(tokens)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-likelihood of each whole text, in windows of ``max_length`` tokens."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.eot_token_id, self.max_length, context_len=1
            )
            for window in windows:
                pairs.append((("", ""), *make_disjoint_window(window)))
                owners.append(i)
        sums = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
        for owner, (value, _) in zip(owners, answers, strict=True):
            sums[owner] += value
        return sums

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is the greedy one."""
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        # Sorted by both lengths, so that few batches mix them.
        order = Collator(rows, sort_fn=lambda row: (-len(row.tokens), -len(row.targets)))
        answers = []
        with tqdm(total=len(rows), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for batch in order.get_batched(n=self.batch_size):
                answers += self._score(batch)
                bar.update(len(batch))
        return order.get_original(answers)

    def _row(self, context: list[int], continuation: list[int]) -> _Row:
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, more than "
                f"max_length={self.max_length}"
            )
        whole = (context or [self.eot_token_id]) + continuation
        return _Row(whole[-(self.max_length + 1) :][:-1], continuation)

    def _score(self, batch: Sequence[_Row]) -> list[tuple[float, bool]]:
        size = buffer_size(max(len(row.tokens) for row in batch), self._most)
        most = max(len(row.targets) for row in batch)
        places = _SHORT if most <= _SHORT else size

        tokens = np.zeros((self.batch_size, size), np.int32)
        targets = np.zeros((self.batch_size, places), np.int32)
        first = np.zeros(self.batch_size, np.int32)
        for i, row in enumerate(batch):
            tokens[i, : len(row.tokens)] = row.tokens
            targets[i, : len(row.targets)] = row.targets
            first[i] = len(row.tokens) - len(row.targets)
        scores = _score(self._state, tokens, first, targets, graph=self._graph)
        values, greedy = np.asarray(scores[0]), np.asarray(scores[1])
        counts = [len(row.targets) for row in batch]
        return [
            (float(values[i, :count].sum(dtype=np.float64)), bool(greedy[i, :count].all()))
            for i, count in enumerate(counts)
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns each continuation up to a stop string; greedy unless the request samples."""
        prompts: list[tuple[list[int], dict]] = []
        for request in requests:
            arguments: Any = request.args
            prompts.append((self.tok_encode(arguments[0]) or [self.eot_token_id], arguments[1]))
        order = Collator(
            prompts,
            sort_fn=lambda prompt: -len(prompt[0]),
            group_fn=lambda prompt: prompt[1],
            group_by="gen_kwargs",
        )
        texts = []
        with tqdm(total=len(prompts), desc="continuations", disable=disable_tqdm) as bar:
            for i, batch in enumerate(order.get_batched(n=self.batch_size)):
                texts += self._continue([tokens for tokens, _ in batch], batch[0][1], i)
                bar.update(len(batch))
        return order.get_original(texts)

    def _continue(
        self, prompts: list[list[int]], options: Mapping[str, Any], seed: int
    ) -> list[str]:
        normal: dict[str, Any] = {**normalize_gen_kwargs(dict(options))}
        until = tuple(stop for stop in normal.pop("until") if stop)
        count = normal.pop("max_gen_toks")
        if unknown := sorted(set(normal) - _SAMPLING):
            raise ValueError(
                f"generation takes {', '.join(sorted(_SAMPLING))}, until and max_gen_toks; "
                f"the task also has {', '.join(unknown)}"
            )
        if not 0 < count < self.max_length:
            raise ValueError(
                f"max_gen_toks must be positive and must be below max_length={self.max_length}, "
                f"got {count}"
            )
        prompts = [self._cut(prompt, self.max_length - count) for prompt in prompts]
        # Prompt and continuation together fill a buffer of generate.
        size = buffer_size(max(map(len, prompts)) + count, self._most) - count
        # Copies of the last row fill up the batch, and end when it does.
        rows = prompts + prompts[-1:] * (self.batch_size - len(prompts))
        tokens = np.zeros((self.batch_size, size), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        sampled = normal["do_sample"]
        out = mc.generate(
            self._model,
            tokens,
            count,
            lengths=np.array([len(row) for row in rows]),
            temperature=normal.get("temperature", 1.0) if sampled else 0.0,
            top_k=normal.get("top_k") or None,
            top_p=normal.get("top_p", 1.0),
            stop_token=self._stop_tokens(until),
            key=jax.random.key(seed),
        )
        new = np.asarray(out)
        return [
            self._text(prompt, new[i, len(prompt) : len(prompt) + count].tolist(), until)
            for i, prompt in enumerate(prompts)
        ]

    def _cut(self, tokens: list[int], most: int) -> list[int]:
        if len(tokens) <= most:
            return tokens
        kept = most // 2 if self.truncate == "middle" else 0
        return tokens[:kept] + tokens[len(tokens) - (most - kept) :]

    def _stop_tokens(self, until: tuple[str, ...]) -> list[int]:
        """Returns the tokens that end a row: those whose text contains a stop string."""
        stops = [i for i, text in enumerate(self._texts) if any(stop in text for stop in until)]
        return [self.eot_token_id, *stops]

    @functools.cached_property
    def _texts(self) -> list[str]:
        return [self._tokenizer.decode([i]) for i in range(self._tokenizer.vocab_size)]

    def _text(self, prompt: list[int], tokens: list[int], until: tuple[str, ...]) -> str:
        if self.eot_token_id in tokens:
            tokens = tokens[: tokens.index(self.eot_token_id)]
        text = added_text(self._tokenizer, prompt, tokens)
        for stop in until:
            text = text.split(stop)[0]
        return text


@functools.partial(jax.jit, static_argnames="graph")
def _score(
    state: Any,
    tokens: Int[Array, "b t"],
    first: Int[Array, "b"],
    targets: Int[Array, "b n"],
    *,
    graph: Any,
) -> tuple[Float[Array, "b n"], Bool[Array, "b n"]]:
    """Returns log-probabilities of targets, and whether each is the most likely token.

    Args:
      state: the model's arrays.
      tokens: the tokens that the model reads.
      first: for each row, the position whose next token is the first target.
      targets: the tokens after that position.
      graph: the model without its arrays.
    """
    model = nnx.merge(graph, state)
    places = first[:, None] + jnp.arange(targets.shape[1])[None]
    places = jnp.minimum(places, tokens.shape[1] - 1)
    hidden = jnp.take_along_axis(model.hidden(tokens), places[..., None], axis=1)
    scores = model.token_scores(hidden, targets)
    return scores.log_probability, scores.greedy
