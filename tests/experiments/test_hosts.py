"""What needs no host: changes to sources, the table, and the page that shows the changes."""

import re
from pathlib import Path

import pytest

from experiments.hosts import __main__ as program
from experiments.hosts import _host, gemma, maxtext, minigpt, tunix

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"
HOSTS = {"minigpt": minigpt, "gemma": gemma, "maxtext": maxtext, "tunix": tunix}


def new_lines(changes):
    lines = [line for _, new in changes for line in new.splitlines()]
    return [line for line in lines if not any(line in old.splitlines() for old, _ in changes)]


@pytest.mark.parametrize("name", HOSTS)
def test_the_page_shows_the_changes_that_are_run(name):
    changes = HOSTS[name].CHANGES
    diffs = "\n".join(re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    for line in new_lines(changes):
        assert f"+{line}" in diffs.splitlines()
    assert _host.count_lines(changes) == len(new_lines(changes)) > 0


def test_a_change_must_be_to_something_there():
    assert _host.patch("a\nb\n", [("a\n", "c\n")]) == "c\nb\n"
    for source in ("b\n", "a\na\n"):
        with pytest.raises(AssertionError, match="times"):
            _host.patch(source, [("a\n", "c\n")])


def test_losses_must_fall():
    assert _host.fell([3.0, 2.0, 1.25]) == "3.00 to 1.25 in 3 steps"
    with pytest.raises(AssertionError, match=r"did not fall: 3\.00 to 2\.75"):
        _host.fell([3.0, 2.75])


def test_the_tokenizer_and_its_prompts():
    tokenizer, rows = _host.Numbers(), _host.words()
    first, second = (tokenizer.encode(prompt) for prompt in _host.prompts())
    assert (first, second) == (rows[0, :7].tolist(), rows[1, :3].tolist())
    assert rows.min() > tokenizer.eos_id()


def test_code_of_a_page():
    page = (
        'Text.\n\n```python outputId="1"\na = 1\n```\n\n```sh\nls\n```\n\n```python\nb = 2\n```\n'
    )
    assert _host.code_blocks(page) == ["a = 1\n", "b = 2\n"]


def test_table():
    rows = [dict(host="A host", version="host 1.0", lines=3, result="loss 3 to 1, " + "x " * 60)]
    head, rule, first, *rest = program.table(rows).splitlines()
    assert head.split() == ["host", "version", "lines", "result"]
    assert len(rule) == 100
    assert first.split()[:5] == ["A", "host", "host", "1.0", "3"]
    assert [line.strip()[0] for line in rest] == ["x"]
