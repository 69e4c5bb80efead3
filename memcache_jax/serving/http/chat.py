"""The text of a conversation, by a Jinja template."""

import datetime
import json
from pathlib import Path
from typing import Any

from memcache_jax import _checks
from memcache_jax.serving.http.errors import refused

PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n"
    "{% endfor %}Assistant:"
)
"""``User: ...`` and ``Assistant: ...`` in turn, for models that have learned no template."""


class ChatTemplate:
    r"""A chat template as the package transformers has them, run in a sandbox.

    Args:
      source: in Jinja, of ``messages``, ``add_generation_prompt`` and the special tokens.
      tokens: texts by name, such as ``bos_token``.

    Raises:
      ValueError: if it is no template.
      ImportError: without the package Jinja2.

    Example:
      >>> template = ChatTemplate(PLAIN)
      >>> template.render([{"role": "user", "content": "Hi"}])
      'User: Hi\nAssistant:'
    """

    def __init__(self, source: str, tokens: dict[str, str] | None = None) -> None:
        try:
            import jinja2
            from jinja2 import ext, sandbox
        except ImportError as error:
            raise ImportError(f"{error}: pip install '.[serve]' in a checkout") from error
        _checks.check_instance("source", source, str, "a template's text")
        self.source, self._tokens = source, _checks.check_mapping("tokens", tokens)
        self._error = jinja2.TemplateError
        options: Any = dict(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
        made = sandbox.ImmutableSandboxedEnvironment(**options)
        made.filters["tojson"] = _to_json
        made.globals |= dict(raise_exception=self._raise, strftime_now=_now)
        try:
            self._template = made.from_string(source)
        except self._error as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error

    @classmethod
    def of_folder(cls, folder: Path) -> "ChatTemplate | None":
        """The template of a public model's folder, if it has one.

        Raises:
          ValueError: that names the file, if it is not as the package transformers writes it.
        """
        options, alone = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        try:
            given = json.loads(options.read_bytes()) if options.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{options} is not JSON: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{options} must hold a JSON object, got {_checks.shown(given)}")
        source = alone.read_text() if alone.is_file() else given.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {x.get("name"): x.get("template") for x in source if isinstance(x, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(f"{options}: chat_template must be text, got {_checks.shown(source)}")
        tokens = {}
        for name, token in given.items():
            content = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(content, str):
                tokens[name] = content
        return cls(source, tokens)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text that an answer follows.

        Raises:
          ApiError: for messages that the template refuses.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._tokens
            )
        except (self._error, TypeError, ValueError, ArithmeticError) as error:
            raise refused(f"the chat template refused the messages: {error}", "messages") from error

    def _raise(self, message: str) -> None:
        raise self._error(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
