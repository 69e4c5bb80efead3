"""The command that serves a model: it answers, and a signal ends it after what runs."""

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import requests

import memcache_jax as mc
from memcache_jax.training import load_model

pytestmark = pytest.mark.slow


def test_it_serves_and_ends(trained_run):
    flags = [f"--workdir={trained_run}", "--port=0", "--rows=2", "--max_length=64", "--piece=4"]
    command = [sys.executable, "-m", "experiments.serve", *flags, "--store_mb=10"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        killer = threading.Timer(300, process.kill)
        killer.start()
        try:
            lines = []
            while not (lines and lines[-1].startswith("Serving demo at ")):
                lines.append(process.stderr.readline())
                assert lines[-1], lines
            url = lines[-1].split()[-1]
            body = dict(model="demo", prompt="the cat", max_tokens=12, temperature=0)
            answer = requests.post(f"{url}/completions", json=body, timeout=100).json()
            chat = dict(messages=[{"role": "user", "content": "the"}])
            refused = requests.post(f"{url}/chat/completions", json=chat, timeout=100)
            long = dict(prompt="the", max_tokens=60, ignore_eos=True, stream=True)
            with requests.post(f"{url}/completions", json=long, stream=True, timeout=100) as told:
                lines = told.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
            assert process.wait(100) == 0
        finally:
            killer.cancel()
            process.kill()
    model, tokenizer, _ = load_model(trained_run)
    whole = mc.generate(model, tokenizer.encode(b"the cat")[None], 12, temperature=0)
    assert answer["choices"][0]["text"] == tokenizer.decode(np.asarray(whole[0, 7:]))
    assert refused.json()["error"]["code"] == "no_chat_template"
    assert rest[-2] == b"data: [DONE]"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --workdir, of a training run, or --pretrained"),
        (["--workdir=nowhere", "--chat_template=nowhere"], "No such file or directory: 'nowhere'"),
    ],
)
def test_what_is_refused(flags, message):
    command = [sys.executable, "-m", "experiments.serve", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
