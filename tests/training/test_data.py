"""The training stream and held-out rows."""

import itertools
import json

import numpy as np
import pytest

from memcache_jax.training.data import heldout_rows, training_iterator
from memcache_jax.training.files import find_files
from memcache_jax.training.records import Records
from memcache_jax.training.tokenizers import ByteTokenizer
from tests.training.texts import letters, write

EOS = ByteTokenizer.eos_id


def batches(records, *, sequence_length=6, batch_size=2, seed=0, shuffle_window=1, **streams):
    return training_iterator(
        records,
        ByteTokenizer(),
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        shuffle_window=shuffle_window,
        **streams,
    )


def documents(iterator, count):
    """The first `count` whole documents of a stream, as ids without their ends."""
    found, current = [], []
    for batch in itertools.islice(iterator, 1000):
        for token in batch["tokens"].ravel().tolist():
            if token == EOS:
                found.append(tuple(current))
                current = []
            else:
                current.append(token)
        if len(found) >= count:
            return found[:count]
    raise AssertionError(f"{len(found)} documents in 1000 batches")


def test_batches_hold_tokens_alone(tmp_path):
    batch = next(batches(letters(tmp_path, [5, 9, 2])))
    assert set(batch) == {"tokens"}
    assert batch["tokens"].shape == (2, 7)
    assert batch["tokens"].dtype == np.int32


def test_each_epoch_has_every_document_once_in_another_order(tmp_path):
    lengths = [5, 9, 2, 13, 1, 4, 7, 6]
    stream = documents(batches(letters(tmp_path, lengths)), 3 * len(lengths))
    whole = {(ord("a") + i,) * n for i, n in enumerate(lengths)}
    epochs = [stream[i : i + len(lengths)] for i in range(0, len(stream), len(lengths))]
    assert all(set(epoch) == whole for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_seed_decides_the_order(tmp_path):
    records = letters(tmp_path, range(1, 11))
    first, again, other = (documents(batches(records, seed=s), 10) for s in (1, 1, 2))
    assert first == again != other


def test_streams_share_out_each_epoch(tmp_path):
    records = letters(tmp_path, range(1, 11))
    shares = [
        documents(batches(records, stream_index=i, num_streams=3), len(range(i, 10, 3)))
        for i in range(3)
    ]
    assert sorted(itertools.chain(*shares)) == sorted(documents(batches(records), 10))


def test_rows_change_places_within_windows(tmp_path):
    records = letters(tmp_path, [30, 50, 20])
    plain, shuffled = (batches(records, batch_size=4, shuffle_window=w) for w in (1, 4))
    moved = []
    for _ in range(5):
        rows, others = (next(stream)["tokens"].tolist() for stream in (plain, shuffled))
        assert sorted(rows) == sorted(others)
        moved.append(rows != others)
    assert any(moved)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("through", ["dict", "json"])
def test_resume_continues_bit_for_bit(tmp_path, through, window):
    # Documents end within rows and at their ends, and some span several rows.
    records = letters(tmp_path, [3, 5, 6, 20, 6, 1, 13, 2])
    original = batches(records, batch_size=1, shuffle_window=window)
    states, rows = [], []
    for _ in range(30):
        states.append(original.get_state())
        rows.append(next(original)["tokens"])
    assert len(json.dumps(states[-1])) < 300
    for i in range(30 - 2):
        state = states[i] if through == "dict" else json.loads(json.dumps(states[i]))
        resumed = batches(records, batch_size=1, shuffle_window=window)
        next(resumed)  # set_state must also forget what was read before
        resumed.set_state(state)
        for row in rows[i : i + 3]:
            np.testing.assert_array_equal(next(resumed)["tokens"], row)


def test_resume_can_be_saved_again(tmp_path):
    records = letters(tmp_path, [3, 5, 6, 20, 6])
    straight, hopping = batches(records), batches(records)
    for _ in range(20):
        state = json.loads(json.dumps(hopping.get_state()))
        hopping = batches(records)
        hopping.set_state(state)
        np.testing.assert_array_equal(next(hopping)["tokens"], next(straight)["tokens"])


def test_one_record_repeats(tmp_path):
    records = letters(tmp_path, [4])
    assert documents(batches(records), 5) == [(ord("a"),) * 4] * 5


def test_stream_errors_come_at_once(tmp_path):
    records = letters(tmp_path, [3, 4])
    with pytest.raises(ValueError, match="3 streams need at least 3 records, got 2"):
        batches(records, num_streams=3)
    with pytest.raises(ValueError, match=r"stream_index must be in \[0, 2\), got 2"):
        batches(records, stream_index=2, num_streams=2)
    with pytest.raises(ValueError, match="batch_size=0"):
        batches(records, batch_size=0)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed in .*, got .*seed={seed}"):
            batches(records, seed=seed)
    write(tmp_path, {"blank.jsonl": ' \n{"text": ""}\n'})
    with pytest.raises(ValueError, match="records with text, got 2 without any"):
        batches(Records([tmp_path / "blank.jsonl"]))


def test_stream_error_in_a_file_keeps_its_name(tmp_path):
    write(tmp_path, {"a.jsonl": '{"text": "fine"}\n{"text": 1}\n'})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        documents(batches(Records(find_files(str(tmp_path)))), 4)


@pytest.mark.parametrize("max_tokens", [30, 1000])
@pytest.mark.parametrize("length", [4, 5])
def test_heldout_predicts_every_target_once(tmp_path, length, max_tokens):
    texts = ["abcdefg", "hij", "klmnopqrstu", "vw", "xyzäß"]
    folder = write(tmp_path, {f"{i}.txt": text for i, text in enumerate(texts)})
    stream = [i for text in texts for i in [*text.encode(), EOS]]
    assert len(stream) == 35
    records = Records(find_files(str(folder)))
    rows = heldout_rows(records, ByteTokenizer(), sequence_length=length, max_tokens=max_tokens)
    count = min(max_tokens, 34) // length
    assert rows.tokens.dtype == np.int32
    assert rows.tokens.shape == (count, length + 1)
    np.testing.assert_array_equal(rows.tokens[1:, 0], rows.tokens[:-1, -1])
    if max_tokens == 1000:
        assert rows.tokens[:, 1:].ravel().tolist() == stream[1 : count * length + 1]
        assert rows.bytes_per_token == pytest.approx(float((rows.tokens[:, 1:] < EOS).mean()))


def test_heldout_spreads_a_small_share_over_the_files(tmp_path):
    records = letters(tmp_path, [9] * 26)
    first, again = (
        heldout_rows(records, ByteTokenizer(), sequence_length=10, max_tokens=60) for _ in "ab"
    )
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.tokens.shape == (6, 11)
    seen = set(first.tokens.ravel().tolist()) - {EOS}
    assert max(seen) - min(seen) > 10  # not the first seven files
    assert first.bytes_per_token == pytest.approx(0.9)


def test_heldout_refuses_too_little_text(tmp_path):
    records = letters(tmp_path, [3, 3])
    with pytest.raises(ValueError, match="has 8 tokens, but one row needs 9"):
        heldout_rows(records, ByteTokenizer(), sequence_length=8, max_tokens=100)
    with pytest.raises(ValueError, match="sequence_length=8, max_tokens=7"):
        heldout_rows(records, ByteTokenizer(), sequence_length=8, max_tokens=7)
    rows = heldout_rows(records, ByteTokenizer(), sequence_length=7, max_tokens=100)
    assert rows.tokens.shape == (1, 8)


def test_bytes_per_token_is_that_of_the_measured_targets(tmp_path):
    lines = [json.dumps({"text": "ab"})] * 300 + [json.dumps({"text": "x" * 100_000})]
    (tmp_path / "uneven.jsonl").write_text("\n".join(lines))
    records = Records([tmp_path / "uneven.jsonl"])
    rows = heldout_rows(records, ByteTokenizer(), sequence_length=100, max_tokens=900)
    targets = rows.tokens[:, 1:]
    assert rows.bytes_per_token == pytest.approx(float((targets < 256).mean()))
