"""The command that measures a trained model, and the model as lm-evaluation-harness sees it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import memcache_jax as mc
from experiments import _lm_eval
from experiments._lm_eval import TrainedLM
from experiments.evaluate import OWN_TASKS, SETS, table
from experiments.tasks import utils
from memcache_jax.nn import in_pieces
from memcache_jax.training.tokenizers import ByteTokenizer, FileTokenizer
from tests.experiments.programs import run

ROOT = Path(__file__).parents[2]
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom."
MAX_LENGTH = 96


@pytest.fixture(scope="module")
def model():
    mixer = mc.nn.MemoryCachingMixer(mc.memories.LinearAttention(), mc.GRM(), mc.Constant(16))
    config = mc.nn.LanguageModelConfig(257, 1, 32, 2, mixers=(mixer,), mlp_features=32)
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    # What it generates is ASCII.
    model.head.kernel[...] = model.head.kernel[...].at[:, 127:].set(0.0) * 3
    return model


@pytest.fixture
def lm(model):
    return TrainedLM(model, ByteTokenizer(), max_length=MAX_LENGTH, batch_size=4)


def requests(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def log_probabilities(model, tokens):
    """Of each next token, by one pass over one row without padding: (t, vocab)."""
    logits = jax.jit(lambda tokens: model(tokens))(jnp.asarray(tokens)[None])[0]
    return np.asarray(jax.nn.log_softmax(logits), np.float64)


def direct(model, read, targets):
    """The log-likelihood of the last tokens, and whether each is the most likely."""
    values = log_probabilities(model, read)[len(read) - len(targets) :]
    chosen = values[np.arange(len(targets)), targets].sum()
    return chosen, bool((values.argmax(axis=1) == targets).all())


@pytest.mark.slow
def test_log_likelihoods_are_sums_of_log_probabilities(lm, model):
    greedy = lm.generate_until(requests("generate_until", (TEXT, {"max_gen_toks": 6})), True)[0]
    pairs = [
        (TEXT, "it was"),
        (TEXT, greedy),
        (TEXT, greedy[:-1] + "~"),
        ("a", f"{TEXT}12345"),  # longer than what has a program of its own
        ("", f"{TEXT}12345"),
        (TEXT * 2, "it was"),  # more than is read
        (f"{TEXT[:60]}  ", "is for a continuation,"),
    ]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        whole = [256] * (not context) + list((context + continuation).encode())
        count = len(whole) - max(1, len(context.rstrip()))
        expected, most_likely = direct(model, whole[-MAX_LENGTH - 1 : -1], whole[-count:])
        assert value == pytest.approx(expected, abs=1e-4)
        assert is_greedy == most_likely
    assert [is_greedy for _, is_greedy in found[:3]] == [False, True, False]


@pytest.mark.slow
def test_rolling_windows(lm, model):
    texts = [TEXT * 3, TEXT[:20], (TEXT * 2)[:MAX_LENGTH], ""]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *zip(texts)), True)
    for text, value in zip(texts, found, strict=True):
        tokens, expected = [256, *text.encode()], 0.0
        for begin in range(0, len(text), MAX_LENGTH):
            end = min(begin + MAX_LENGTH, len(text))
            # The last window reads as much as fits, and is asked for what is left.
            read, targets = tokens[max(0, end - MAX_LENGTH) : end], tokens[begin + 1 : end + 1]
            expected += direct(model, read, targets)[0]
        assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_few_programs_and_pieces_of_logits(lm, model, monkeypatch):
    program: Any = _lm_eval._score
    before = program._cache_size()
    pairs = [(TEXT[:i], TEXT[i : i + 1 + i % 7]) for i in range(1, 50)]
    whole = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert program._cache_size() - before <= 1  # another test may have compiled it
    monkeypatch.setattr(in_pieces, "LOGITS", 257 * 4 * 5)  # of 20 tokens at once
    program.clear_cache()
    parts = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert parts == [(pytest.approx(value, abs=1e-4), greedy) for value, greedy in whole]


def continuation(model, prompt, count):
    size = 40 if len(prompt) < 40 else len(prompt)  # few programs
    tokens = ByteTokenizer().encode(prompt.encode().ljust(size))[None]
    tokens = mc.generate(model, tokens, count, lengths=np.array([len(prompt)]), temperature=0)
    return ByteTokenizer().decode(np.asarray(tokens)[0, len(prompt) : len(prompt) + count])


@pytest.mark.slow
def test_continuations_are_those_of_generate(lm, model):
    prompts = [TEXT[:k] for k in (5, 31, 1, 12, 20, 30)] + [TEXT * 2]
    whole = [continuation(model, prompt[-(MAX_LENGTH - 20) :], 20) for prompt in prompts]
    letter, pair = whole[0][7], whole[1][5:7]
    options = {"until": [letter, pair], "max_gen_toks": 20}
    found = lm.generate_until(requests("generate_until", *((p, options) for p in prompts)), True)
    assert found == [text.split(letter)[0].split(pair)[0] for text in whole]
    assert found[0] != whole[0]
    assert found[1] != whole[1]
    assert lm._stop_tokens((letter, pair)) == [256, ord(letter)]
    mixed = [(prompts[0], {"max_gen_toks": 3}), (prompts[1], {"max_gen_toks": 5, "until": "\0"})]
    found = lm.generate_until(requests("generate_until", *mixed), True)
    assert found == [whole[0][:3], whole[1][:5].split("\0")[0]]


@pytest.mark.slow
def test_generation_samples_where_a_task_asks_for_it(lm, model):
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 20}
    found = lm.generate_until(requests("generate_until", *[(TEXT[:30], options)] * 2), True)
    assert found[0] != found[1]
    assert found == lm.generate_until(
        requests("generate_until", *[(TEXT[:30], options)] * 2), disable_tqdm=True
    )


@pytest.mark.slow
def test_nothing_is_padded_beyond_listed_segments(model):
    mixer = mc.nn.MemoryCachingMixer(mc.memories.LinearAttention(), mc.GRM(), mc.Lengths((48, 48)))
    config = dataclasses.replace(model.config, mixers=(mixer,))
    listed = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    nnx.update(listed, nnx.state(model))
    lm = TrainedLM(listed, ByteTokenizer(), max_length=200, batch_size=1)
    prompt = TEXT[:20]
    (text,) = lm.generate_until(requests("generate_until", (prompt, {"max_gen_toks": 60})), True)
    assert len(text) == 60
    ((_, greedy),) = lm.loglikelihood(requests("loglikelihood", (prompt, text)), True)
    assert greedy


def test_the_middle_may_be_left_out(model):
    options: dict[str, Any] = dict(max_length=10, batch_size=1)
    tokens = list(range(20))
    assert TrainedLM(model, ByteTokenizer(), **options)._cut(tokens, 5) == [15, 16, 17, 18, 19]
    middle = TrainedLM(model, ByteTokenizer(), truncate="middle", **options)
    assert middle._cut(tokens, 5) == [0, 1, 17, 18, 19]
    assert middle._cut(tokens, 20) == tokens


def test_a_tokenizer_of_several_letters(model, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"</s>": 0, "a": 1, "b": 2, "\n": 3, "a\nb": 4, "b\n": 5}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="</s>"))
    built.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    lm = TrainedLM(model, tokenizer, max_length=8)
    assert lm._stop_tokens(("\n",)) == [0, 3, 4, 5]
    assert lm.tok_encode("a") == [1]
    assert lm._text([2], [1, 0, 2], ()) == " a"  # words are joined by spaces


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("loglikelihood", ("a", "b" * 97), "a continuation has 97 tokens, more than max_length=96"),
        ("generate_until", ("a", {"max_gen_toks": 96}), "must be below max_length=96"),
        ("generate_until", ("a", {"num_beams": 4}), "the task also has num_beams"),
    ],
)
def test_what_cannot_be_done_is_an_error(lm, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(lm, kind)(requests(kind, arguments), disable_tqdm=True)


def test_truncation_keeps_the_answer_in_the_middle():
    tokenizer = ByteTokenizer()
    context = "".join(chr(ord("a") + i % 20) for i in range(200)) + "XYZ" + "w" * 200
    short = utils.truncate(context, "xyz", 100, tokenizer)
    assert len(short) == 100
    assert short.index("XYZ") == 50
    assert utils.truncate(context, None, 100, tokenizer) == context[:100]
    assert utils.truncate(context, "nowhere", 100, tokenizer) == context[:100]
    assert utils.truncate(context, "abc", 100, tokenizer) == context[:100]
    assert utils.truncate("w" * 200 + "XYZ", "XYZ", 100, tokenizer) == "w" * 50 + "XYZ"
    assert utils.truncate(f" {context} ", "xyz", 500, tokenizer) == context
    with pytest.raises(ValueError, match="must be above 50"):
        utils.truncate(context, "xyz", 0, tokenizer)


def test_prompt_and_score():
    doc = {"context": "[PAR] The sky is blue. The sky is", "question": "The sky is "}
    assert utils.prompt(doc) == "The sky is blue. The sky is"
    doc = {"answers": ["Blue", "azure"]}
    assert utils.contains(doc, [" it is AZURE, or so"]) == {"contains": 1.0}
    assert utils.contains(doc, [" green"]) == {"contains": 0.0}


def test_table_has_the_means_of_complete_sets():
    entries = [
        {
            "task": task,
            "results": {task: {f"{metric},none": i / 10, f"{metric}_stderr,none": 0.01}},
            "n-samples": {task: {"original": 9, "effective": 5}},
        }
        for i, (task, metric) in enumerate(SETS["paper_retrieval"].items())
    ]
    lines = table(entries).splitlines()
    assert lines[1].split() == ["swde", "contains", "0.0000", "0.0100", "5"]
    assert lines[-1].split() == ["paper_retrieval", "mean", "0.2500"]
    assert "mean" not in table(entries[:-1])


def test_the_paper_s_own_tasks_are_found():
    found = TaskManager(include_path=OWN_TASKS, include_defaults=False)
    cloze = [name for name in SETS["paper_retrieval"] if name.startswith("cloze_")]
    assert found.all_tasks == sorted(cloze)
    for name in cloze:
        task: Any = found.task_index[name].cfg
        assert task["metadata"]["context_length"] == 2048
        assert task["dataset_kwargs"]["path"].startswith("hazyresearch/")


def write_tasks(folder):
    """Task files and their data."""
    folder.mkdir()
    docs = [
        {"question": "the cat sat on", "choices": ["the mat.", "a dog"], "label": 0},
        {"question": "the cat", "choices": ["ate", "sat on"], "label": 1},
        {"question": "", "choices": ["the cat", "zzz"], "label": 0},
    ]
    contexts = ["the cat sat on the mat. " * 20, "the cat sat", "the mat"]
    cloze = [
        {"context": context, "question": "the cat sat on", "answers": [answer]}
        for context, answer in zip(contexts, ["mat", "x", "cat"], strict=True)
    ]
    for name, rows in (("choice", docs), ("cloze", cloze)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(f"""
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {folder}/choice.jsonl}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
""")
    (folder / "rolling.yaml").write_text(f"""
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {folder}/rolling.jsonl}}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
""")
    (folder / "cloze.yaml").write_text(f"""
include: {ROOT}/experiments/tasks/_cloze.yaml
task: tiny_cloze
dataset_kwargs: {{path: json, data_files: {folder}/cloze.jsonl, split: train}}
metadata: {{context_length: 90}}
""")


@pytest.mark.slow
def test_an_interrupted_run_goes_on(trained_run, tmp_path):
    write_tasks(tmp_path / "tasks")
    output = tmp_path / "results.json"

    def evaluate(*flags):
        options = [f"--include_path={tmp_path}/tasks", f"--output={output}"]
        options += [f"--workdir={trained_run}", "--batch_size=2", "--max_length=128"]
        environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        return run("evaluate", *options, *flags, timeout=600, **environment)

    tasks = "--tasks=tiny_choice,tiny_rolling,tiny_cloze"
    failed = evaluate(tasks)
    assert failed.returncode == 1, failed.stderr
    assert "rolling.jsonl" in failed.stderr.splitlines()[-1]
    (first,) = json.loads(output.read_text())
    assert first["task"] == "tiny_choice"
    assert first["n-samples"]["tiny_choice"]["effective"] == 3

    (tmp_path / "tasks/rolling.jsonl").write_text(json.dumps({"text": "the cat sat. " * 9}))
    done = evaluate(tasks, "--batch_size=3")  # which is no other measurement
    assert done.returncode == 0, done.stderr
    assert "tiny_choice: measured before" in done.stdout
    entries = json.loads(output.read_text())
    assert entries[0] == first
    assert [entry["task"] for entry in entries] == ["tiny_choice", "tiny_rolling", "tiny_cloze"]
    assert entries[2]["n-samples"]["tiny_cloze"]["effective"] == 2  # "x" is too short
    for entry in entries:
        assert entry["task"] in done.stdout.split("examples")[1]

    limited = evaluate("--tasks=tiny_choice", "--limit=1")
    assert limited.returncode == 0, limited.stderr
    assert json.loads(output.read_text())[:3] == entries
    assert json.loads(output.read_text())[3]["n-samples"]["tiny_choice"]["effective"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--metadata=[]", "error: metadata must be a JSON object, got '[]'"),
        (
            "--workdir=nowhere --include_path=nowhere",
            "error: include_path must name folders, got nowhere",
        ),
        ("--output={foreign}", "error: {foreign} holds no results of this program"),
    ],
)
def test_errors_are_one_line(trained_run, tmp_path, flag, message):
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"loss": 1}')
    flags = flag.format(foreign=foreign).split()
    done = run("evaluate", f"--workdir={trained_run}", "--tasks=piqa", *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(message.format(foreign=foreign))
    assert "Traceback" not in done.stderr
