"""The command that continues a text with a trained model."""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.training import load_model
from tests.experiments.programs import run

pytestmark = pytest.mark.slow


def test_the_text_is_that_of_the_model(trained_run):
    done = run(
        "generate", f"--workdir={trained_run}", "--prompt=the c", "--max_new_tokens=20", "--seed=3"
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer, _ = load_model(trained_run)
    prompt = tokenizer.encode(b"the c")[None]
    expected = mc.generate(
        model,
        prompt,
        20,
        temperature=0.8,
        top_p=0.95,
        stop_token=tokenizer.eos_id,
        key=jax.random.key(3),
    )
    assert done.stdout == tokenizer.decode(np.asarray(expected[0])) + "\n"
    assert done.stdout.startswith("the c")
    assert re.fullmatch(r"\d+ tokens, \d+ tokens/s", done.stderr.strip())  # and nothing of Orbax


def test_greedy_from_the_cache_is_greedy_by_passing_over_everything(trained_run):
    model, tokenizer, _ = load_model(trained_run)
    prompts = np.stack([tokenizer.encode(b"the cat sat"), tokenizer.encode(b"sat on the ")])
    cached = np.asarray(mc.generate(model, prompts, 60, temperature=0))
    graph, state = nnx.split(model)
    anew = mc.generate(lambda tokens: nnx.merge(graph, state)(tokens), prompts, 60, temperature=0)
    np.testing.assert_array_equal(cached, anew)
    assert tokenizer.decode(cached[0]).startswith("the cat sat on the mat.")


def test_a_new_document_without_a_prompt(trained_run):
    done = run(
        "generate", f"--workdir={trained_run}", "--max_new_tokens=8", "--temperature=0", "--nostop"
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer, _ = load_model(trained_run)
    prompt = np.array([[tokenizer.eos_id]])
    expected = mc.generate(model, prompt, 8, temperature=0)
    assert done.stdout == tokenizer.decode(np.asarray(expected[0])) + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir={empty}"], "error: expected the workdir of a training run, got {empty}"),
        (["--workdir={run}", "--top_p=2"], "error: top_p must be in (0, 1], got 2.0"),
    ],
)
def test_errors_are_one_line(trained_run, tmp_path, flags, message):
    places = {"empty": tmp_path, "run": trained_run}
    done = run("generate", *(flag.format(**places) for flag in flags))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(message.format(**places))
    assert "Traceback" not in done.stderr


def test_a_conversation_goes_on_in_one_cache(trained_run):
    command = [sys.executable, "-m", "experiments.generate", f"--workdir={trained_run}"]
    flags = ["--interactive", "--temperature=0", "--max_new_tokens=6", "--nostop"]
    done = subprocess.run(
        [*command, *flags],
        input="the c\nand so\n\n",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tokens/s") == 2
    model, tokenizer, _ = load_model(trained_run)
    told, answers = np.zeros((1, 0), int), []
    for line in ("the c\n", "and so\n"):
        told = np.concatenate([told, tokenizer.encode(line.encode())[None]], axis=1)
        answer = np.asarray(mc.generate(model, told, 6, temperature=0))
        answers.append(tokenizer.decode(answer[0, told.shape[1] :]))
        told = answer
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)
