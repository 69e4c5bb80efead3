"""Programs on a public model's folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.training.tokenizers import FileTokenizer
from tests.experiments.programs import run
from tests.training.test_pretrained import public_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer of its 97 ids."""
    return public_folder(tmp_path_factory.mktemp("public") / "model", "mamba2")


def test_a_text_is_continued(folder):
    flags = "--prompt=w5 w7 w11", "--max_new_tokens=9", "--temperature=0", "--nostop"
    done = run("generate", f"--pretrained={folder}", "--segment=4", *flags)
    assert done.returncode == 0, done.stderr
    model = mc.pretrained.load(folder)
    cached = mc.nn.with_memory_caching(model, segmentation=mc.Constant(4))
    wanted = mc.generate(cached, np.array([[5, 7, 11]]), 9, temperature=0)
    tokenizer = FileTokenizer(folder / "tokenizer.json", eos_token="<end>")
    assert done.stdout.strip() == tokenizer.decode(np.asarray(wanted[0])).strip()


def test_its_reads_become_a_page(folder, tmp_path):
    text = tmp_path / "text"
    text.write_text("w3 w4 w5 w6 w7 w8")
    done = run(
        "inspect", f"--pretrained={folder}", "--segment=2", f"--text={text}", f"--output={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "inspect.json").read_text())
    assert len(found["layers"]) == 2
    gates = np.asarray(found["layers"][0]["gates"])
    assert gates.shape == (6, 8, 3)
    np.testing.assert_allclose(gates[-1], 1 / 3, atol=1e-4)


def test_it_is_measured_on_tasks(folder, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "w3 w4 w5 w6 w7 w8 w9"}) + "\n")
    (tmp_path / "rolling.yaml").write_text(f"""
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {tmp_path}/text.jsonl}}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
""")
    output = f"--output={tmp_path}/results.json"
    flags = f"--include_path={tmp_path}", "--tasks=tiny_rolling", output, "--batch_size=2"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    found = []
    for segment in ((), ("--segment=2",)):
        done = run(
            "evaluate", f"--pretrained={folder}", "--max_length=16", *segment, *flags, **offline
        )
        assert done.returncode == 0, done.stderr
        entry = json.loads((tmp_path / "results.json").read_text())[-1]
        found.append(entry["results"]["tiny_rolling"]["word_perplexity,none"])
    tokens = jnp.array([[0, *range(3, 10)]])
    models = [mc.pretrained.load(folder)]
    models += [mc.nn.with_memory_caching(models[0], segmentation=mc.Constant(2))]
    for model, value in zip(models, found, strict=True):
        logits = jax.nn.log_softmax(model(tokens[:, :-1]))
        loss = -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()
        assert value == pytest.approx(np.exp(loss), rel=1e-3)
    done = run("evaluate", "--pretrained=nowhere", *flags)  # before anything is read
    assert done.returncode == 1
    assert "give --max_length" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give --workdir, of a training run, or --pretrained"),
        (("--workdir=a", "--pretrained=b"), "give --workdir, of a training run, or --pretrained"),
        (("--workdir=a", "--segment=4"), "--segment is for --pretrained"),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together(flags, message):
    done = run("generate", *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
