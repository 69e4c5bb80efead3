"""The batcher: requests of all kinds side by side get what they would get alone."""

import asyncio
import contextlib
import itertools
import queue
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import memcache_jax as mc
from memcache_jax.serving.programs import decode
from memcache_jax.serving.scores import read_piece
from tests.serving.models import LENGTH, VOCAB, ids, model, spoilt

LONG: dict[str, Any] = dict(rows=3, max_length=LENGTH, piece=4)


def batcher(**options: Any):
    return mc.Batcher(options.pop("model", model()), **LONG | options)


def text_of(tokens):
    return "".join(chr(97 + token) for token in tokens)


@pytest.mark.slow
def test_requests_get_the_tokens_of_generate():
    """More requests than rows, with prompts and ends of all lengths.

    The parameters are committed to a device, as those that are read from files are.
    """
    sizes = [(1, 9), (13, 20), (4, 1), (7, 30), (20, 3), (2, 12), (11, 11)]
    programs: tuple[Any, Any] = read_piece, decode
    before = [program._cache_size() for program in programs]
    graph, state = nnx.split(model())
    served = batcher(model=nnx.merge(graph, jax.device_put(state, jax.devices()[0])))
    requests = [served.submit(ids(i, count), new) for i, (count, new) in enumerate(sizes)]
    served.run()
    counts = np.array([count for count, _ in sizes])
    prompts = np.stack([np.resize(ids(i, count), 20) for i, count in enumerate(counts)])
    alone = np.asarray(mc.generate(model(), prompts, 30, lengths=counts, temperature=0))
    for row, request, (count, new) in zip(alone, requests, sizes, strict=True):
        assert request.tokens == row[count : count + new].tolist()
        assert request.finish_reason == "length"
    # Pieces of 4, 2 and 1 tokens, and one program for all steps.
    after = [program._cache_size() for program in programs]
    assert [now - then for now, then in zip(after, before, strict=True)] == [3, 1]
    assert not served.step()


@pytest.mark.slow
def test_sampled_tokens_do_not_depend_on_neighbours():
    how: list[dict] = [
        dict(temperature=1.0, seed=3),
        dict(temperature=0.7, top_k=4, seed=4),
        dict(temperature=1.5, top_p=0.8, seed=3),
        dict(),
    ]
    alone = []
    for i, options in enumerate(how):
        served = batcher()
        alone.append(served.submit(ids(i, 9), 25, **options))
        served.run()
    served = batcher()
    others = [served.submit(ids(9 + i, 5 * i + 1), 4 + i) for i in range(4)]
    for _ in range(3):
        served.step()
    together = [served.submit(ids(i, 9), 25, **options) for i, options in enumerate(how)]
    again = served.submit(ids(0, 9), 25, temperature=1.0, seed=4)
    served.run()
    assert all(request.finish_reason == "length" for request in others)
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
    assert again.tokens != together[0].tokens  # another seed


def test_ends_of_requests():
    first = batcher()
    plain = first.submit(ids(1, 6), 20)
    first.run()
    stop, text = plain.tokens[8], text_of(plain.tokens[9:12])
    served = batcher(text_of=text_of)

    def fail(token):
        raise OSError("the client has gone")

    requests = dict(
        plain=served.submit(ids(1, 6), 20),
        failed=served.submit(ids(1, 6), 20, on_token=fail),
        stopped=served.submit(ids(1, 6), 20, stop_tokens=(VOCAB - 1, stop)),
        text=served.submit(ids(1, 6), 20, stop_texts=["nowhere", text]),
        cancelled=served.submit(ids(1, 6), 20),
        waiting=served.submit(ids(1, 6), 20),
        last=served.submit(ids(1, 6), 20),
    )
    requests["waiting"].cancel()
    while len(requests["cancelled"].tokens) < 3:
        served.step()
    requests["cancelled"].cancel()
    served.run()
    reasons = {name: request.finish_reason for name, request in requests.items()}
    assert reasons == dict(
        plain="length",
        failed="error",
        stopped="stop",
        text="stop",
        cancelled="cancelled",
        waiting="cancelled",
        last="length",
    )
    assert requests["plain"].tokens == requests["last"].tokens == plain.tokens
    first_stop = plain.tokens.index(stop)
    assert requests["stopped"].tokens == plain.tokens[: first_stop + 1]
    whole = text_of(requests["text"].tokens)
    assert whole.endswith(text)
    assert text not in whole[:-1]
    assert requests["waiting"].tokens == []
    with pytest.raises(OSError, match="the client has gone"):
        requests["failed"].result()


def test_a_request_that_is_cancelled_while_the_waiting_are_looked_through(monkeypatch):
    served, looks = batcher(), itertools.count()
    request = served.submit(ids(1, 6), 20)
    monkeypatch.setattr(type(request), "is_cancelled", property(lambda _: next(looks) > 0))
    served.run()
    assert request.finish_reason == "cancelled"


@pytest.mark.slow
def test_not_a_number_hurts_one_request():
    served = batcher(model=spoilt())
    good, bad = served.submit(ids(1, 6), 9), served.submit([1, VOCAB - 1, 2], 9)
    served.run()
    later = served.submit(ids(1, 6), 9)  # in the row of the bad one, or another
    others = [served.submit(ids(1, 6), 9) for _ in range(2)]
    served.run()
    with pytest.raises(FloatingPointError, match="not finite"):
        bad.result()
    assert good.tokens == later.tokens == others[0].tokens == others[1].tokens


@pytest.mark.slow
def test_a_store_of_prefixes():
    store = mc.PrefixStore(10**8)
    served = batcher(store=store)
    prompts = [ids(0, 21), np.append(ids(0, 17), ids(1, 8)), ids(0, 21)]
    requests, compiled = [], []
    programs: tuple[Any, Any] = read_piece, decode
    for prompt in prompts:
        compiled = [program._cache_size() for program in programs]
        requests.append(served.submit(prompt, 10))
        served.run()
    # The programs of what is found are those of what is read.
    assert compiled == [program._cache_size() for program in programs]
    assert [request.known for request in requests] == [0, 16, 20]
    assert requests[0].tokens == requests[2].tokens
    plain = batcher()
    cold = plain.submit(prompts[1], 10)
    plain.run()
    assert cold.tokens == requests[1].tokens
    # Caches of another kind fail where they are used, and nothing else does.
    other = mc.Batcher(model(), rows=1, max_length=LENGTH - 1, piece=4, store=store)
    failed = other.submit(prompts[0], 10)
    other.run()
    with pytest.raises(ValueError, match="made alike"):
        failed.result(0)


def test_several_tokens_in_one_step():
    """Tokens match steps of one token, wherever requests end among them."""
    counts = []
    for ahead in (1, 4):
        served = batcher(ahead=ahead)
        first = served.submit(ids(1, 6), 17, temperature=0.9, seed=2, logprobs=2)
        served.run()
        stops = (first.tokens[5],)
        others = [
            served.submit(ids(1, 6), 17, temperature=0.9, seed=2, stop_tokens=stops),
            *(served.submit(ids(i, 3 + i), 5 + 4 * i) for i in range(4)),
        ]
        steps = 0
        while served.step():
            steps += 1
        counts.append(([r.tokens for r in (first, *others)], first.logprobs, steps))
    (one, scores, steps), (several, same, fewer) = counts
    assert several == one
    assert same == scores
    assert len(one[1]) <= 6
    assert fewer < steps


@pytest.mark.slow
def test_a_callback_that_cancels_among_several_tokens():
    served, counts = batcher(ahead=4), []

    def cancel(_):
        if len(requests[1].tokens) == 2:
            counts.append([len(request.tokens) for request in requests])
            for request in requests:
                request.cancel()

    requests = [served.submit(ids(i, 6), 17, on_token=cancel) for i in (1, 2)]
    served.run()
    assert [request.finish_reason for request in requests] == ["cancelled"] * 2
    assert [[len(request.tokens) for request in requests]] == counts


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_device_that_fails_once(monkeypatch, when):
    """Requests in rows get its error; those that wait are served, as if nothing had been."""
    served, calls = batcher(), []

    def decode_but_once(*args, **options):
        calls.append(None)
        if len(calls) != 7:
            return decode(*args, **options)
        if when == "later":
            tokens, *others = decode(*args, **options)
            tokens.delete()
            return tokens, *others
        jax.tree.map(lambda x: x.delete(), args[-1])  # as after a call that was given it
        raise RuntimeError("the device has been deleted")

    monkeypatch.setattr("memcache_jax.serving.batcher.decode", decode_but_once)
    requests = [served.submit(ids(1, 6), 9) for _ in range(5)]
    served.run()
    for request in requests[:3]:
        with pytest.raises(RuntimeError, match="has been deleted"):
            request.result()
    assert [len(request.tokens) for request in requests[3:]] == [9, 9]
    assert requests[3].tokens == requests[4].tokens


def test_a_row_is_free_once_its_last_token_is_asked_for():
    """The next request begins while the device draws that token; a step gives a token of each."""
    served, seen = batcher(rows=1), []
    requests = [served.submit(ids(1, 4), 3) for _ in range(2)]
    while served.step():
        seen.append(tuple(len(request.tokens) for request in requests))
    # The first prompt; two tokens that are asked for a step before; the second prompt among them.
    assert seen == [(1, 0), (2, 0), (3, 1), (3, 2), (3, 3)]
    assert served.load == (1, 0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ahead"), [("Auto", 1), ("Explicit", 1), ("Explicit", 2)])
def test_rows_on_a_mesh(kind, ahead):
    """One program for all steps, wherever XLA leaves what a step returns."""
    mesh = jax.make_mesh((3,), ("data",), (jax.sharding.AxisType[kind],))
    graph, state = nnx.split(model())
    everywhere = nnx.merge(graph, jax.device_put(state, NamedSharding(mesh, P())))

    def tokens(served):
        requests = [served.submit(ids(i, 4), 5, temperature=i, seed=i) for i in range(4)]
        served.run()
        return [request.result() for request in requests]

    program: Any = decode
    # Explicit axes are in arrays' types, so that threads need no context.
    with jax.set_mesh(mesh) if ahead == 1 else contextlib.nullcontext():
        rows = NamedSharding(mesh, P("data"))
        divided = batcher(model=everywhere, ahead=ahead, cache=dict(sharding=rows))
        before = program._cache_size()
        found = tokens(divided)
        assert program._cache_size() == before + 1
    assert found == tokens(batcher())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_died():
    def leave(token):
        raise SystemExit

    served = batcher()
    asked = [served.submit([1], 4, on_token=leave), *(served.submit([2], 4) for _ in range(3))]
    with served:
        for request in asked:
            with pytest.raises(RuntimeError, match="the batcher's thread ended: SystemExit"):
                request.result(60)
        assert not served.is_serving
        with pytest.raises(RuntimeError, match="the batcher's thread ended"):
            served.submit([1], 4)


@pytest.mark.slow
def test_a_thread_serves_iterators():
    wanted = batcher()
    plain = [wanted.submit(ids(i, 6), 8 + i) for i in range(6)]
    wanted.run()

    async def consume(request):
        return [token async for token in request]

    async def consume_all(requests):
        return await asyncio.gather(*map(consume, requests))

    seen: list[int] = []
    with batcher() as served:
        first = served.submit(ids(0, 6), 8, on_token=seen.append)
        assert list(first) == plain[0].tokens
        requests = [served.submit(ids(i, 6), 8 + i) for i in range(1, 6)]
        requests.append(served.submit(ids(1, 6), LENGTH - 6))
        requests[-1].cancel()
        got = asyncio.run(consume_all(requests))
        late = served.submit(ids(2, 6), 10)
    assert seen == plain[0].tokens
    assert got[:-1] == [request.tokens for request in plain[1:]]
    assert requests[-1].finish_reason == "cancelled"
    assert late.result(0) == plain[2].tokens


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused():
    one: Any = 3
    served = batcher(most_waiting=1, cache=dict(max_segments=2))
    for call, message in {
        lambda: batcher(rows=0): "rows must be at least 1, got 0",
        lambda: batcher(ahead=0): "ahead must be at least 1, got 0",
        lambda: batcher(piece=6): "piece must be a power of two, got 6",
        lambda: batcher(model=print): r"model must be an mc\.nn\.LanguageModel",
        lambda: batcher(store=3): r"store must be an mc\.PrefixStore, got 3",
        lambda: batcher(text_of="utf-8"): "text_of must be a function of token ids, got 'utf-8'",
        lambda: batcher(cache=dict(segments=3)): r"no options \['segments'\]",
        lambda: served.submit([], 3): "at least one token",
        lambda: served.submit([VOCAB], 3): "token ids from 0 to 22, got 23",
        lambda: served.submit([1], 0): "max_new_tokens must be at least 1",
        lambda: served.submit([1] * 20, 5): "20 and max_new_tokens=5 .* max_length=24",
        lambda: served.submit([1], 2, temperature=-1): "temperature must be",
        lambda: served.submit([1], 2, seed=-1): "seed must be at least 0",
        lambda: served.submit([1], 2, seed=2**32): "seed must be at most 4294967295",
        lambda: served.submit([1], 2, logprobs=21): "logprobs must be at most 20, got 21",
        lambda: served.submit([1], 2, score_prompt=True): "score_prompt needs logprobs",
        lambda: served.submit([1], 2, on_token=one): "on_token must be a function of a token id",
        lambda: served.submit([1], 2, stop_tokens=[1, 23]): "stop_tokens must hold token ids",
        lambda: served.submit([1], 2, stop_tokens=one): "stop_tokens must be a tuple, got 3",
        lambda: served.submit([1], 2, stop_texts="no"): "stop_texts must be a tuple, got 'no'",
        lambda: served.submit([1], 2, stop_texts=[""]): "stop_texts must be texts, not empty",
        lambda: served.submit([1], 2, stop_texts=["x"]): "stop_texts need a batcher with text_of",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    waits = served.submit([1], 2)
    with pytest.raises(queue.Full, match="1 requests wait already"):
        served.submit([1], 2)
    with pytest.raises(TimeoutError, match=r"within 0\.01 seconds"):
        waits.result(0.01)


def test_how_likely_tokens_are():
    options: dict[str, Any] = dict(temperature=0.9, seed=5)
    prompt = ids(2, 11)
    served = batcher(store=mc.PrefixStore(10**8))
    plain = served.submit(prompt, 6, **options)
    served.run()
    scored = served.submit(prompt, 6, **options, logprobs=3, score_prompt=True)
    few = served.submit(prompt, 6, **options, logprobs=0)
    served.run()
    assert plain.tokens == scored.tokens == few.tokens
    assert plain.logprobs == plain.prompt_logprobs == few.prompt_logprobs == []
    assert [logprob.likely for logprob in few.logprobs] == [()] * 6
    whole = np.append(prompt, scored.tokens)
    wanted = np.asarray(jax.nn.log_softmax(model()(jnp.asarray(whole)[None])[0]), np.float64)
    told = scored.prompt_logprobs + scored.logprobs
    assert len(scored.prompt_logprobs) == 10
    for place, (logprob, token) in enumerate(zip(told, whole[1:], strict=True)):
        assert logprob.value == pytest.approx(wanted[place, token], abs=1e-4)
        best = np.sort(wanted[place])[::-1][:3]
        np.testing.assert_allclose([value for _, value in logprob.likely], best, atol=1e-4)
        for token, value in logprob.likely:
            assert value == pytest.approx(wanted[place, token], abs=1e-4)
    assert (plain.known, scored.known, few.known) == (0, 0, 8)
