"""What a body of OpenAI's completions or chat asks for."""

import dataclasses
import secrets
from typing import Any

import numpy as np

from memcache_jax import _checks
from memcache_jax.serving.http.chat import ChatTemplate
from memcache_jax.serving.http.errors import ApiError, refused
from memcache_jax.serving.http.fields import Fields
from memcache_jax.serving.http.text import Vocabulary
from memcache_jax.serving.scores import MOST_LIKELY

_DEFAULT_NEW = 16  # OpenAI's, of completions
_SAYING_NOTHING = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that a request may ask for; more is refused.

    Attributes:
      body: bytes of its body.
      new_tokens: tokens of each answer; None for what the batcher has room for.
      choices: answers, ``n`` times the number of prompts.
      stops: texts that end an answer.
    """

    body: int = 1 << 22
    new_tokens: int | None = None
    choices: int = 128
    stops: int = 32

    def __post_init__(self) -> None:
        sizes = ("body", "new_tokens", "choices", "stops")
        _checks.check_fields(self, sizes=sizes, optional=("new_tokens",))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is continued.

    Attributes:
      ids: its tokens.
      text: as it came, or that of the tokens.
    """

    ids: np.ndarray
    text: str


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
      prompts: at least one.
      n: answers to each.
      max_tokens: the most new tokens of each; 0 only scores the prompts.
      sampling: temperature, top_k and top_p, as the batcher takes them.
      seed: of the first answer.
      stops: texts that end an answer.
      ends: whether the end of the document ends it.
      stream: whether answers are told as they come.
      usage: whether the stream tells the numbers of tokens.
      echo: whether the prompt is told too.
      logprobs: how many likely tokens are told at each place; None for no log-probabilities.
    """

    prompts: tuple[Prompt, ...]
    n: int
    max_tokens: int
    sampling: dict[str, Any]
    seed: int
    stops: tuple[str, ...]
    ends: bool
    stream: bool
    usage: bool
    echo: bool = False
    logprobs: int | None = None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Reads bodies for one model.

    Attributes:
      model: its name.
      vocabulary: its tokens.
      vocab_size: its number of ids.
      max_length: most tokens of a prompt and its answer.
      limits: of requests.
      template: of chats, if there is one.
    """

    model: str
    vocabulary: Vocabulary
    vocab_size: int
    max_length: int
    limits: Limits
    template: ChatTemplate | None

    def completion(self, body: Any) -> Asked:
        """Reads a body of ``/v1/completions``."""
        fields = Fields(body)
        prompts = self._prompts(fields)
        echo = fields.flag("echo")
        given = fields.integer("max_tokens", least=0 if echo else 1, most=2**31 - 1)
        logprobs = fields.integer("logprobs", least=0, most=5)
        common = self._common(fields, prompts)
        fields.unserved("best_of", 1, common["n"])
        fields.unserved("suffix", "")
        fields.end()
        max_tokens = self._max_tokens("max_tokens", given, prompts, _DEFAULT_NEW)
        return Asked(**common, max_tokens=max_tokens, echo=echo, logprobs=logprobs)

    def chat(self, body: Any) -> Asked:
        """Reads a body of ``/v1/chat/completions``."""
        fields = Fields(body)
        if self.template is None:
            raise refused(
                "this server has no chat template: the model's folder names none, and none was "
                "given to the server; use /v1/completions",
                code="no_chat_template",
            )
        text = self.template.render(_messages(fields.take("messages")))
        prompts = (Prompt(self.vocabulary.encode_chat(text), text),)
        if not len(prompts[0].ids):
            raise refused("the messages have no tokens", "messages")
        names = ("max_completion_tokens", "max_tokens")
        given = [fields.integer(name, least=1, most=2**31 - 1) for name in names]
        wants = fields.flag("logprobs")
        likely = fields.integer("top_logprobs", least=0, most=MOST_LIKELY)
        if likely is not None and not wants:
            raise refused("top_logprobs needs logprobs to be true", "top_logprobs")
        common = self._common(fields, prompts)
        for name, neutral in {
            **dict(tools=[[]], functions=[[]], tool_choice=["none", "auto"], audio=[]),
            **dict(function_call=["none", "auto"], response_format=[{"type": "text"}]),
            **dict(modalities=[["text"]], prediction=[], web_search_options=[]),
            **dict(parallel_tool_calls=[True, False], reasoning_effort=["none"]),
            **dict(store=[False], verbosity=["medium"]),
        }.items():
            fields.unserved(name, *neutral)
        fields.end()
        chosen = next((new for new in given if new is not None), None)
        max_tokens = self._max_tokens(names[given[0] is None], chosen, prompts, self.max_length)
        logprobs = (likely or 0) if wants else None
        return Asked(**common, max_tokens=max_tokens, logprobs=logprobs)

    def _common(self, fields: Fields, prompts: tuple[Prompt, ...]) -> dict[str, Any]:
        self.check_model(fields.text("model", self.model))
        n = fields.integer("n", 1, least=1, most=self.limits.choices)
        if n * len(prompts) > self.limits.choices:
            raise refused(
                f"{len(prompts)} prompts and n={n} are more than {self.limits.choices} answers", "n"
            )
        sampling = dict(
            temperature=fields.number("temperature", 1.0, least=0, most=100),
            top_p=fields.number("top_p", 1.0, least=1e-9, most=1),
            top_k=fields.integer("top_k", least=1, most=2**31 - 1),
        )
        stream = fields.flag("stream")
        options = fields.take("stream_options")
        if options is not None and not stream:
            raise refused("stream_options needs stream to be true", "stream_options")
        nested = Fields({} if options is None else options, "stream_options")
        usage = nested.flag("include_usage")
        nested.ignored("include_obfuscation")
        nested.end()
        seed = fields.integer("seed", least=-(2**63), most=2**63 - 1)
        for name in ("frequency_penalty", "presence_penalty"):
            fields.unserved(name, 0)
        fields.unserved("logit_bias", {})
        fields.ignored(*_SAYING_NOTHING)
        return dict(
            prompts=prompts,
            n=n,
            sampling=sampling,
            seed=secrets.randbelow(2**31) if seed is None else seed,
            stops=fields.texts("stop", self.limits.stops),
            ends=not fields.flag("ignore_eos"),
            stream=stream,
            usage=usage,
        )

    def _prompts(self, fields: Fields) -> tuple[Prompt, ...]:
        given = fields.take("prompt", "")
        if isinstance(given, str) or (isinstance(given, list) and given and _is_id(given[0])):
            given = [given]
        if not isinstance(given, list) or not given:
            raise refused(
                "prompt must be a text, a list of texts, of token ids or of lists of them, got "
                f"{_checks.shown(given)}",
                "prompt",
            )
        if len(given) > self.limits.choices:
            raise refused(f"prompt has {len(given)} parts, most {self.limits.choices}", "prompt")
        return tuple(self._prompt(fields, each) for each in given)

    def _prompt(self, fields: Fields, given: Any) -> Prompt:
        if not isinstance(given, list):
            text = fields.encodable("prompt", given)
            return Prompt(self.vocabulary.encode(text), text)
        return Prompt(*self.ids("prompt", given))

    def ids(self, name: str, given: Any) -> tuple[np.ndarray, str]:
        """Token ids and their text, or ApiError."""
        if not isinstance(given, list) or not given or not all(map(_is_id, given)):
            raise refused(f"{name} must be token ids, got {_checks.shown(given)}", name)
        if min(given) < 0 or max(given) >= self.vocab_size:
            wrong = next(x for x in given if not 0 <= x < self.vocab_size)
            raise refused(
                f"{name} must have ids from 0 to {self.vocab_size - 1}, got {wrong}", name
            )
        return np.array(given, np.int32), self.vocabulary.tokenizer.decode(given)

    def check_model(self, name: str) -> None:
        """Raises ApiError for another model's name."""
        if name != self.model:
            message = f"there is no model {_checks.shown(name)} here, only {self.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _max_tokens(
        self, name: str, given: int | None, prompts: tuple[Prompt, ...], default: int
    ) -> int:
        length = max(len(prompt.ids) for prompt in prompts)
        room = self.max_length - length
        most = self.limits.new_tokens
        if given is not None and most is not None and given > most:
            raise refused(f"{name} must be at most {most}, got {given}", name)
        if room < 1 or (given is not None and given > room):
            asked = "" if given is None else f" and {name}={given}"
            raise refused(
                f"this server's maximum context length is {self.max_length} tokens; the prompt has "
                f"{length}{asked}",
                name if room >= 1 else "prompt",
                "context_length_exceeded",
            )
        if given is not None:
            return given
        return min(default, room) if most is None else min(default, room, most)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _messages(given: Any) -> list[dict[str, str]]:
    """Roles and texts of a chat, or ApiError."""
    if not isinstance(given, list) or not given:
        wanted = "messages must be a list of objects with role and content"
        raise refused(f"{wanted}, got {_checks.shown(given)}", "messages")
    messages = []
    for i, each in enumerate(given):
        fields = Fields(each, f"messages[{i}]")
        role = fields.text("role")
        content = fields.take("content")
        if role is None or content is None:
            raise refused(f"messages[{i}] must have a role and a content", "messages")
        if isinstance(content, list):
            content = "".join(_part(part, f"messages[{i}].content") for part in content)
        content = fields.encodable("content", content)
        fields.ignored("name")
        for name in ("refusal", "audio", "annotations", "function_call", "tool_call_id"):
            fields.unserved(name)
        fields.unserved("tool_calls", [])
        fields.end()
        messages.append(dict(role=role, content=content))
    return messages


def _part(given: Any, name: str) -> str:
    fields = Fields(given, name)
    kind = fields.text("type")
    if kind != "text":
        raise refused(f"{name} must have parts of type 'text', got {_checks.shown(kind)}", name)
    text = fields.text("text", "")
    fields.end()
    return text
