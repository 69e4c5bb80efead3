"""The text of compiled programs."""

import jax
import pytest

from experiments._hlo import printed


class Compiled:
    """A program with a text, or one that XLA cannot print."""

    def __init__(self, text):
        self.text = text

    def as_text(self):
        if self.text == "error":
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction\nand more")
        return self.text


def test_a_program_that_cannot_be_printed_says_so():
    assert printed(Compiled("HloModule")) == "HloModule"
    assert printed(Compiled(None)) == ""
    with pytest.raises(NotImplementedError, match="cannot print it: INTERNAL: async-update inst"):
        printed(Compiled("error"))
