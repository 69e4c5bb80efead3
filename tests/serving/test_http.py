"""The server as its clients see it: OpenAI's package, lm-evaluation-harness, and many at once."""

import asyncio
import gc
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import aiohttp
import jax
import jax.numpy as jnp
import openai
import pytest
import requests
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from prometheus_client.parser import text_string_to_metric_families

from memcache_jax.serving.request import Load, Request
from memcache_jax.training.tokenizers import ByteTokenizer
from tests.serving.http.running import ROWS, model, running, slowly

pytestmark = pytest.mark.slow

STATM = Path("/proc/self/statm")


@pytest.fixture(scope="module")
def served():
    with running() as (url, server, _):
        server.batcher.submit([1] * 7, 3).result(600)  # compiles
        yield url, server


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def direct(server, prompt, new, **options):
    """The tokens that the batcher itself gives."""
    return server.batcher.submit(list(prompt.encode()), new, **options).result(300)


def text(tokens):
    return ByteTokenizer().decode(tokens)


def post(url, path="completions", **body):
    return requests.post(f"{url}/v1/{path}", json=body, timeout=300)


def events(lines):
    """The JSON of a stream's events, up to the last one."""
    for line in lines:
        if line.startswith(b"data: "):
            if line == b"data: [DONE]":
                return
            yield json.loads(line[6:])
    pytest.fail("the stream ended without [DONE]")


def metrics(url):
    families = text_string_to_metric_families(requests.get(f"{url}/metrics", timeout=300).text)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def wait_until(true, seconds=300):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_completions_of_the_openai_package(served, client):
    how: dict[str, Any] = dict(temperature=0.9, seed=5)
    wanted = direct(served[1], "hello", 12, **how)
    asked = dict(model="tiny", prompt="hello", max_tokens=12, **how)
    answer = client.completions.create(**asked, n=2)
    assert answer.choices[0].text == text(wanted)
    assert answer.choices[1].text == text(direct(served[1], "hello", 12, temperature=0.9, seed=6))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 24)
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 2
    parts = list(client.completions.create(**asked, stream=True, n=2))
    for i, choice in enumerate(answer.choices):
        told = [part.choices[0] for part in parts if part.choices[0].index == i]
        assert "".join(part.text for part in told) == choice.text
        assert [part.finish_reason for part in told[-2:]] == [None, "length"]
    # A list of texts, one of tokens, and the end by a text.
    several = client.completions.create(**asked | dict(prompt=["hello", "h"]))
    assert several.choices[0].text == text(wanted)
    ids = client.completions.create(**asked | dict(prompt=list(b"hello"), max_tokens=1), echo=True)
    assert ids.choices[0].text == "hello" + text(wanted[:1])
    whole = answer.choices[0].text
    stop = whole[3:5]
    stopped = client.completions.create(**asked, stop=["nowhere", stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_log_probabilities(client):
    asked = dict(model="tiny", prompt="hello", temperature=0)
    echo = client.completions.create(**asked, max_tokens=3, logprobs=2, echo=True).choices[0]
    told = echo.logprobs
    assert told.tokens[:5] == list("hello")
    assert told.token_logprobs[0] is told.top_logprobs[0] is None
    assert told.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    # The new tokens are the most likely ones; the prompt's are told beside two others.
    tops = [max(top.values()) for top in told.top_logprobs[5:]]
    assert told.token_logprobs[5:] == tops
    assert [len(top) for top in told.top_logprobs[1:]] == [3] * 4 + [2] * 3
    scored = client.completions.create(**asked, max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].text == "hello"
    assert scored.choices[0].logprobs.token_logprobs == told.token_logprobs[:5]
    assert scored.usage.completion_tokens == 0


def test_chats_of_the_openai_package(served, client):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    asked = dict(model="tiny", messages=messages, max_completion_tokens=6, temperature=0)
    wanted = text(direct(served[1], "System: Be brief.\nUser: Hi\nAssistant:", 6))
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert choice.message.content == wanted
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 6
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content for part in parts[:-1]) == wanted
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].usage.completion_tokens == 6


def test_a_client_that_goes_cancels_its_request(served, client):
    url, server = served
    before = metrics(url).get(("memcache_choices_total", "cancelled"), 0)
    with slowly(server):
        stream = client.completions.create(
            model="tiny", prompt="a", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        assert server.batcher.load.decoding == 1
        stream.close()
        wait_until(lambda: server.batcher.load == Load(ROWS, 0, 0, 0))
    wait_until(lambda: metrics(url)["memcache_choices_total", "cancelled"] == before + 1)


def test_lm_evaluation_harness(served):
    url, server = served
    lm: Any = get_model("local-completions")
    lm = lm(model="tiny", base_url=f"{url}/v1/completions", max_length=100, batch_size=2)
    assert lm.tokenizer_backend == "remote"
    assert lm.eot_token_id == 256
    score = jax.jit(lambda tokens: jax.nn.log_softmax(model()(tokens)))
    start = next(c for c in "abcdefghijk" if direct(server, c, 1)[0] < 128)
    pairs = [("the cat", " sat"), (start, text(direct(server, start, 1))), ("a", "b"), ("", "cd")]
    instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = lm.loglikelihood(instances, disable_tqdm=True)
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        whole = list(context.encode()) or [256]
        begin = len(whole)
        whole += continuation.encode()
        places = score(jnp.asarray([whole + [0] * (16 - len(whole))]))[0]
        wanted = sum(float(places[i - 1, whole[i]]) for i in range(begin, len(whole)))
        assert value == pytest.approx(wanted, rel=1e-5)
        greedy = [int(places[i - 1].argmax()) == whole[i] for i in range(begin, len(whole))]
        assert is_greedy == all(greedy)
    assert found[1][1]
    tokens = direct(server, "the cat", 8)
    until = text(tokens[5:6])
    prompts = [("the cat", {"until": [until], "max_gen_toks": 8}), ("a", {"max_gen_toks": 3})]
    instances = [Instance("generate_until", {}, pair, i) for i, pair in enumerate(prompts)]
    whole = text(tokens)
    end = whole.index(until)
    assert lm.generate_until(instances) == [whole[:end], text(direct(server, "a", 3))]


def test_what_is_refused(served):
    url, server = served
    one = dict(prompt="a", max_tokens=1)
    user = [{"role": "user", "content": "a"}]
    for body, param, message in [
        (dict(prompt=3), "prompt", "must be a text, a list of texts, of token ids"),
        (dict(prompt=[]), "prompt", "must be a text, a list"),
        (dict(prompt=[[]]), "prompt", "must be token ids"),
        (dict(prompt=[1, 257]), "prompt", "ids from 0 to 256, got 257"),
        (dict(prompt=[1, "a"]), "prompt", "must be token ids"),
        (dict(prompt="\ud800"), "prompt", "without lone surrogates"),
        (dict(prompt="a" * 128), "prompt", "maximum context length is 128 tokens"),
        (dict(prompt="a" * 60, max_tokens=69), "max_tokens", "60 and max_tokens=69"),
        (one | dict(max_tokens=101), "max_tokens", "at most 100, got 101"),
        (one | dict(max_tokens=0), "max_tokens", "from 1 to"),
        (one | dict(max_tokens=1.5), "max_tokens", "must be an integer, got 1.5"),
        (one | dict(max_tokens=True), "max_tokens", "must be an integer, got True"),
        (one | dict(n=129), "n", "from 1 to 128"),
        (dict(prompt=["a"] * 9, n=100), "n", "more than 128 answers"),
        (one | dict(temperature=-1), "temperature", "from 0 to 100"),
        (one | dict(temperature=10**400), "temperature", "from 0 to 100"),
        (one | dict(temperature="hot"), "temperature", "must be a number"),
        (one | dict(top_p=0), "top_p", "from 1e-09 to 1"),
        (one | dict(seed=1.0), "seed", "must be an integer"),
        (one | dict(stop=[""]), "stop", "not empty"),
        (one | dict(stop=["a"] * 33), "stop", "at most 32 texts"),
        (one | dict(stream="yes"), "stream", "true or false"),
        (one | dict(stream_options={}), "stream_options", "needs stream"),
        (one | dict(logprobs=6), "logprobs", "from 0 to 5"),
        (one | dict(best_of=3), "best_of", "not supported"),
        (one | dict(suffix="b"), "suffix", "not supported"),
        (one | dict(frequency_penalty=0.5), "frequency_penalty", "not supported"),
        (one | dict(prompt_="b"), "prompt_", "unrecognized field 'prompt_'"),
        (dict(messages=[]), "messages", "a list of objects with role and content"),
        (dict(messages=[{"role": "user"}]), "messages", "a role and a content"),
        (dict(messages=[{"role": "user", "content": 3}]), "messages[0].content", "a text, got 3"),
        (dict(messages=user, tools=[{}]), "tools", "not supported"),
        (dict(messages=user, top_logprobs=2), "top_logprobs", "needs logprobs"),
        (dict(messages=[user[0] | dict(x=1)]), "messages[0].x", "unrecognized field"),
    ]:
        answer = post(url, "chat/completions" if "messages" in body else "completions", **body)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
        assert error["param"] == param
        assert message in error["message"], error
    json_type = {"Content-Type": "application/json"}
    for status, message, call in [
        (404, "no model 'other' here", dict(json=one | dict(model="other"))),
        (400, "not JSON", dict(data="{", headers=json_type)),
        (400, "not JSON", dict(data="[" * 10_000, headers=json_type)),
        (400, "must be a JSON object", dict(data="[]", headers=json_type)),
        (400, "from 0 to 100", dict(data='{"temperature": NaN}', headers=json_type)),
        (413, "exceeded", dict(json=dict(prompt="a" * 30_000))),
        (415, "Content-Type: application/json", dict(data='{"prompt": "a"}')),
    ]:
        answer = requests.post(f"{url}/v1/completions", **call, timeout=300)
        assert answer.status_code == status
        assert message in answer.json()["error"]["message"]
    assert requests.get(f"{url}/v1/nothing", timeout=300).status_code == 404
    assert requests.get(f"{url}/v1/completions", timeout=300).status_code == 405
    assert server.batcher.load == Load(ROWS, 0, 0, 0)


def test_metrics(served):
    url, _ = served
    before = metrics(url)
    post(url, prompt=["ab", "c"], max_tokens=2, n=2, ignore_eos=True)
    after = metrics(url)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["memcache_http_requests_total", "/v1/completions", "200"] == 1
    assert grown["memcache_choices_total", "length"] == 4
    assert grown["memcache_prompt_tokens_total",] == 3
    assert grown["memcache_new_tokens_total",] == 8
    assert grown["memcache_known_prompt_tokens_total",] <= 3
    assert grown["memcache_time_to_first_token_seconds_count",] == 4
    assert grown["memcache_choice_seconds_bucket", "+Inf"] == 4
    assert after["memcache_rows",] == ROWS
    assert after["memcache_queue_waiting",] == after["memcache_rows_decoding",] == 0
    assert requests.get(f"{url}/health", timeout=300).json() == {"status": "ok"}
    (described,) = requests.get(f"{url}/v1/models", timeout=300).json()["data"]
    assert described == requests.get(f"{url}/v1/models/tiny", timeout=300).json()
    assert (described["id"], described["max_model_len"]) == ("tiny", 128)


def test_a_full_queue_and_the_end():
    """What runs ends as asked; what comes is refused, and may try again."""
    long = dict(prompt="ab", max_tokens=40, ignore_eos=True, stream=True)
    with running(most_waiting=3) as (url, server, stop), slowly(server):
        full = post(url, prompt="a", n=10, max_tokens=50)
        assert (full.status_code, full.headers["Retry-After"]) == (429, "1")
        assert full.json()["error"]["code"] == "queue_full"
        wait_until(lambda: server.batcher.load == Load(ROWS, 0, 0, 0))  # all ten or none
        usage = dict(stream_options={"include_usage": True})
        with requests.post(f"{url}/v1/completions", json=long | usage, stream=True) as answer:
            parts = events(answer.iter_lines())
            next(parts)
            stop()
            wait_until(lambda: requests.get(f"{url}/health", timeout=300).status_code == 503)
            late = post(url, prompt="a")
            assert (late.status_code, late.headers["Retry-After"]) == (503, "5")
            assert list(parts)[-1]["usage"]["completion_tokens"] == 40
    with running(grace=0.1) as (url, server, stop), slowly(server):
        with requests.post(f"{url}/v1/completions", json=long, stream=True) as answer:
            lines = answer.iter_lines()
            next(lines)
            stop()
            told = [json.loads(line[6:]) for line in lines if line]
        assert "the server is stopping" in told[-1]["error"]["message"]


async def wave(url, plans):
    """Streams all at once; the texts, None of those that went after their first event."""

    async def one(session, plan):
        body = dict(
            stream=True, ignore_eos=True, temperature=1, stream_options=dict(include_usage=1)
        )
        body |= dict(stream_options={"include_usage": True}, prompt=plan["prompt"])
        body |= dict(seed=plan["seed"], max_tokens=plan["new"])
        parts, whole = [], False
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            assert answer.status == 200
            async for line in answer.content:
                whole = whole or line == b"data: [DONE]\n"
                if line.startswith(b"data: {"):
                    parts.append(json.loads(line[6:]))
                    if plan["goes"]:
                        answer.close()
                        return None
        assert whole
        assert parts[-1]["usage"]["completion_tokens"] == plan["new"]
        assert parts[-2]["choices"][0]["finish_reason"] == "length"
        return "".join(part["choices"][0]["text"] for part in parts[:-1])

    options: dict[str, Any] = dict(timeout=aiohttp.ClientTimeout(total=None))
    options |= dict(connector=aiohttp.TCPConnector(limit=0))
    async with aiohttp.ClientSession(**options) as session:
        return await asyncio.gather(*(one(session, plan) for plan in plans))


@pytest.mark.skipif(not STATM.exists(), reason="reads its memory as Linux tells it")
def test_five_hundred_streams(served):
    url, server = served
    rng = random.Random(0)
    prompts = ["".join(rng.choices("abcdef ", k=rng.choice([1, 2, 4]))) for _ in range(20)]
    whole = [
        server.batcher.submit(list(p.encode()), 40, temperature=1.0, seed=i)
        for i, p in enumerate(prompts)
    ]
    tokens = [request.result(300) for request in whole]
    del whole
    resident, before = [], metrics(url)
    for most in (4, 40):
        plans = []
        for i in range(500):
            seed = i % len(prompts)
            new, goes = rng.randint(1, most), i % 10 == 9
            plans.append(dict(prompt=prompts[seed], seed=seed, new=100 if goes else new, goes=goes))
        rng.shuffle(plans)
        texts = asyncio.run(wave(url, plans))
        for plan, told in zip(plans, texts, strict=True):
            assert told == (None if plan["goes"] else text(tokens[plan["seed"]][: plan["new"]]))
        wait_until(lambda: server.open == 0 and server.batcher.load == Load(ROWS, 0, 0, 0))
        gc.collect()
        resident.append(int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert not [each for each in gc.get_objects() if type(each) is Request]
    assert resident[1] - resident[0] < 16e6
    after = metrics(url)
    ended = {
        reason: after.get(("memcache_choices_total", reason), 0)
        - before.get(("memcache_choices_total", reason), 0)
        for reason in ("length", "cancelled", "error", "stop")
    }
    assert ended["length"] >= 900
    assert ended["length"] + ended["cancelled"] == 1000
    assert ended["error"] == ended["stop"] == 0
