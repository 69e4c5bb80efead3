"""Programs on a public model's folder."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.training.tokenizers import FileTokenizer
from tests.pretrained.test_read import FOLDERS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer of its 97 ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("public") / "model"
    shutil.copytree(FOLDERS / "mamba2", folder)
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, 97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    options = json.dumps({"eos_token": {"content": "<end>"}})
    (folder / "tokenizer_config.json").write_text(options)
    return folder


def run(program, *flags):
    command = [sys.executable, "-m", f"experiments.{program}", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


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
