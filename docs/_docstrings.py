"""Reads the docstrings' examples and literal blocks as Markdown, for the API reference."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """``Example:`` is a section of prompts and results, and ``::`` opens an indented block."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Changes the docstring before it is parsed."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.M)
