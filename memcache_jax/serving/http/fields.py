"""Fields of a JSON object, each taken once and checked; those left over are refused."""

from typing import Any

from memcache_jax._checks import shown
from memcache_jax.serving.http.errors import refused


class Fields:
    """The fields of a request's body; null is the same as absent.

    Args:
      body: the JSON value.
      prefix: names the object in errors.

    Raises:
      ApiError: unless it is an object.
    """

    def __init__(self, body: Any, prefix: str = "") -> None:
        if not isinstance(body, dict):
            raise refused(f"{prefix or 'the body'} must be a JSON object, got {shown(body)}")
        self._left, self._prefix = dict(body), f"{prefix}." if prefix else ""

    def take(self, name: str, default: Any = None) -> Any:
        """Any value."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def integer(self, name: str, default: Any = None, *, least: int, most: int) -> Any:
        """A whole number."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "an integer", value)
        if not least <= value <= most:
            raise self._wrong(name, f"from {least} to {most}", value)
        return value

    def number(self, name: str, default: float, *, least: float, most: float) -> float:
        """A finite number."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, "a number", value)
        if not least <= value <= most:  # nor is NaN
            raise self._wrong(name, f"from {least} to {most}", value)
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def text(self, name: str, default: Any = None) -> Any:
        """A text that can be encoded."""
        value = self.take(name)
        if value is None:
            return default
        return self.encodable(name, value)

    def encodable(self, name: str, value: Any) -> str:
        """The value, if it is a text without halves of characters."""
        if not isinstance(value, str):
            raise self._wrong(name, "a text", value)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self._wrong(name, "Unicode text, without lone surrogates", value) from error
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text, or several."""
        value = self.take(name, [])
        values = value if isinstance(value, list) else [value]
        if len(values) > most:
            raise self._wrong(name, f"at most {most} texts", value)
        for text in values:
            if not self.encodable(name, text):
                raise self._wrong(name, "texts that are not empty", value)
        return tuple(values)

    def unserved(self, name: str, *neutral: Any) -> None:
        """Raises ApiError for a field of OpenAI's unless it asks for nothing."""
        value = self.take(name)
        if value is not None and value not in neutral:
            raise refused(
                f"{self._prefix}{name} is not supported by this server, got {shown(value)}",
                f"{self._prefix}{name}",
                "unsupported_parameter",
            )

    def ignored(self, *names: str) -> None:
        """Drops fields that say nothing about the answer."""
        for name in names:
            self._left.pop(name, None)

    def end(self) -> None:
        """Raises ApiError if any field is left."""
        for name in self._left:
            label = f"{self._prefix}{name}"
            raise refused(f"unrecognized field {label!r:.100}", label[:100], "unknown_parameter")

    def _wrong(self, name: str, wanted: str, got: Any) -> Exception:
        label = f"{self._prefix}{name}"
        return refused(f"{label} must be {wanted}, got {shown(got)}", label)
