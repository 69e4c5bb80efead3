"""Functions that the task files of this folder call."""

import re
from pathlib import Path
from typing import Any

import datasets

from memcache_jax.training.durable import read_json
from memcache_jax.training.export import load_tokenizer
from memcache_jax.training.tokenizers import Tokenizer, published_tokenizer

ANSWER_LENGTH = 50  # tokens of context_length reserved for question and answer


def load(
    path: str, *, workdir: str, context_length: int, split: str = "validation", **options: Any
) -> dict[str, datasets.Dataset]:
    """Returns a data set with truncated contexts, as its split "validation".

    Drops documents whose first answer has fewer than two characters.

    Args:
      path: as for ``datasets.load_dataset``.
      workdir: the run, or the public model's folder, whose tokenizer counts the tokens.
      context_length: tokens of a context, of which ``ANSWER_LENGTH`` are reserved.
      split: the split to read.
      options: ``name``, ``data_files`` and ``data_dir`` go to ``datasets.load_dataset``; others are
        ignored.
    """
    folder = Path(workdir)
    is_public = not {"model_type", "ssm_cfg"}.isdisjoint(read_json(folder / "config.json"))
    tokenizer = published_tokenizer(folder) if is_public else load_tokenizer(folder)
    known = {key: options[key] for key in ("name", "data_files", "data_dir") if key in options}
    docs = []
    for doc in datasets.load_dataset(path, split=split, **known):
        answers = doc["answers"]
        if answers and len(answers[0]) > 1:
            short = truncate(doc["context"], answers[0], context_length - ANSWER_LENGTH, tokenizer)
            docs.append({**doc, "context": short})
    return {"validation": datasets.Dataset.from_list(docs)}


def truncate(context: str, answer: str | None, length: int, tokenizer: Tokenizer) -> str:
    """Returns at most ``length`` tokens of a context, centered on the beginning of the answer.

    Without an answer in the context, these are the first tokens. An answer near the end has fewer
    tokens after it.

    Raises:
      ValueError: for a length below 1.
    """
    if length < 1:
        raise ValueError(
            f"context_length must be above {ANSWER_LENGTH}, got {length + ANSWER_LENGTH}"
        )
    context = context.strip()
    tokens = tokenizer.encode(context.encode(errors="replace"))
    if len(tokens) <= length:
        return context
    found = re.search(re.escape(answer), context, re.IGNORECASE) if answer else None
    before = context[: found.start()] if found else ""
    place = len(tokenizer.encode(before.encode(errors="replace")))
    start = max(0, place - length // 2)
    return tokenizer.decode(tokens[start : start + length])


def prompt(doc: dict[str, Any]) -> str:
    """Returns ``{context}. {cloze question}``, without paragraph marks."""
    context = re.sub(r"\[(?:PAR|DOC|TLE)\]", "", doc["context"]).strip()
    question = doc["question"].strip()
    # Some contexts end with the question itself.
    while question and context.lower().endswith(question.lower()):
        context = context[: -len(question)].strip()
    return f"{context.strip('.')}. {question}"


def contains(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Scores 1 if the continuation contains any of the answers, ignoring case."""
    text = results[0].lower()
    return {"contains": float(any(answer.lower() in text for answer in doc["answers"]))}
