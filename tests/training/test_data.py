"""Files, records, the training stream and held-out rows."""

import itertools
import json
import pickle
import sys

import numpy as np
import pytest

from memcache_jax.training.data import heldout_rows, training_iterator
from memcache_jax.training.files import Records, find_files, split_files
from memcache_jax.training.tokenizers import ByteTokenizer

EOS = ByteTokenizer.eos_id


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def names(files, folder):
    return [file.relative_to(folder).as_posix() for file in files]


def letters(tmp_path, lengths):
    """Records of one letter each, repeated `lengths` times: a for the first, b for the second."""
    texts = {f"{i:02}.txt": chr(ord("a") + i) * n for i, n in enumerate(lengths)}
    return Records(find_files(str(write(tmp_path / "letters", texts))))


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


# Files.


def test_find_files_folders_files_and_globs(tmp_path):
    write(tmp_path, {"a/1.txt": "1", "a/b/2.py": "2", "c/3.py": "3", "a/.git/x": "x", "a/.y": "y"})
    assert names(find_files(str(tmp_path)), tmp_path) == ["a/1.txt", "a/b/2.py", "c/3.py"]
    patterns = [str(tmp_path / "a/b"), str(tmp_path / "**/*.py"), str(tmp_path / "a/b/2.py")]
    assert names(find_files(patterns), tmp_path) == ["a/b/2.py", "c/3.py"]
    assert names(find_files(str(tmp_path), exclude="*/b/*"), tmp_path) == ["a/1.txt", "c/3.py"]


def test_find_files_names_a_file_once_however_it_is_written(tmp_path, monkeypatch):
    write(tmp_path, {"a[1]/x.txt": "x"})
    monkeypatch.chdir(tmp_path / "a[1]")
    assert find_files(["x.txt", "./x.txt", "*.txt", "."]) == [tmp_path / "a[1]" / "x.txt"]


def test_find_files_says_why_there_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path, {"x/1.txt": "1"})
    with pytest.raises(ValueError, match="empty' is an empty folder"):
        find_files(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"\*\.py' matches no file"):
        find_files([str(tmp_path / "*.py")])
    with pytest.raises(ValueError, match="typo': not found"):
        find_files([str(tmp_path / "x"), str(tmp_path / "typo")])
    with pytest.raises(ValueError, match=r"all 1 files of .* are excluded"):
        find_files(str(tmp_path / "x"), exclude=["*.txt"])


def test_split_is_the_same_wherever_the_tree_lies(tmp_path):
    tree = {f"{i % 7}/{i}.txt": "x" for i in range(200)}
    splits = []
    for place in ("here", "there/deeper"):
        folder = write(tmp_path / place, tree)
        train, heldout = split_files(find_files(str(folder)), 0.1)
        splits.append((names(train, folder), names(heldout, folder)))
    assert splits[0] == splits[1]
    train, heldout = splits[0]
    assert sorted(train + heldout) == sorted(tree)
    assert 8 <= len(heldout) <= 35


def test_split_does_not_move_files_when_others_come(tmp_path):
    folder = write(tmp_path, {f"{i}.txt": "x" for i in range(50)})
    _, before = split_files(find_files(str(folder)), 0.2)
    write(tmp_path, {f"{i}.txt": "x" for i in range(50, 80)})
    train, after = split_files(find_files(str(folder)), 0.2)
    assert set(before) <= set(after)
    assert not set(before) & set(train)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_split_leaves_a_file_on_each_side(tmp_path, fraction):
    files = find_files(str(write(tmp_path, {f"{i}.txt": "x" for i in range(5)})))
    assert sorted(map(len, split_files(files, fraction))) == [1, 4]


def test_split_by_name_takes_held_out_files_out_of_training(tmp_path):
    folder = write(tmp_path, {"a.txt": "a", "b.txt": "b", "valid/c.txt": "c"})
    train, heldout = split_files(find_files(str(folder)), 0.5, str(folder / "valid"))
    assert names(train, folder) == ["a.txt", "b.txt"]
    assert names(heldout, folder) == ["valid/c.txt"]
    with pytest.raises(ValueError, match="all 3 files are held out"):
        split_files(find_files(str(folder)), 0.5, [str(folder)])


def test_split_refuses_one_file_and_bad_fractions(tmp_path):
    files = find_files(str(write(tmp_path, {"a.txt": "a", "b.txt": "b"})))
    with pytest.raises(ValueError, match=r"1 file.*heldout_patterns"):
        split_files(files[:1], 0.1)
    with pytest.raises(ValueError, match="in \\(0, 1\\), got 0"):
        split_files(files, 0.0)


# Records.


def test_text_files_are_one_record_each_and_empty_ones_none(tmp_path):
    folder = write(tmp_path, {"a.txt": "a\n\nb", "b.md": "", "c.bin": b"\xff\xfe", "d.py": "d"})
    records = Records(find_files(str(folder)))
    assert [records[i] for i in range(len(records))] == [[b"a\n\nb"], [b"\xff\xfe"], [b"d"]]
    with pytest.raises(IndexError):
        records[3]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_jsonl_is_one_record_per_line(tmp_path, monkeypatch, chunk, end):
    monkeypatch.setattr("memcache_jax.training.files._CHUNK", chunk)
    lines = ['{"text": "é\\n1"}', "", '{"text": "2", "id": 2}', '{"text": "3"}']
    folder = write(tmp_path, {"0.txt": "0", "a.jsonl": "\n".join(lines) + end, "b.txt": "b"})
    records = pickle.loads(pickle.dumps(Records(find_files(str(folder)))))
    read = [records[i] for i in range(len(records))]
    assert read == [[b"0"], ["é\n1".encode()], [b"2"], [b"3"], [b"b"]]


def test_jsonl_blank_empty_and_null_lines_are_no_documents(tmp_path):
    folder = write(tmp_path, {"a.jsonl": '{"t": "1"}\r\n\r\n  \n{"t": ""}\n{"t": null}\n'})
    records = Records(find_files(str(folder)), text_field="t")
    assert [text for i in range(len(records)) for text in records[i]] == [b"1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x"}', "expected an object with the field 'text'"),
        ('["text"]', "expected an object with the field 'text'"),
        ('{"text": 3}', "expected text, got a int"),
        ('{"text": "x"', "line 4: Expecting"),
        (b'{"text": "\xff"}', "line 4: 'utf-8' codec"),
    ],
    ids=["no-field", "no-object", "no-text", "bad-json", "bad-utf8"],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    folder = write(tmp_path, {"a.jsonl": b'{"text": "1"}\n\n{"text": "2"}\n' + line + b"\n"})
    records = Records(find_files(str(folder)))
    with pytest.raises(ValueError, match=message) as error:
        records[2]
    assert "a.jsonl, line 4" in str(error.value)


def test_parquet_is_one_record_per_row_group(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": ["0", "é", None, "", "4", "5", "6"], "id": list(range(7))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    write(tmp_path, {"b.txt": "b"})
    records = Records(find_files(str(tmp_path)))
    read = [records[i] for i in range(len(records))]
    assert read == [[b"0", "é".encode()], [b"4", b"5"], [b"6"], [b"b"]]
    with pytest.raises(ValueError, match="no column 'body': it has text, id"):
        Records(find_files(str(tmp_path)), text_field="body")
    with pytest.raises(ValueError, match=r"a\.parquet, column 'id': expected text"):
        Records([tmp_path / "a.parquet"], text_field="id")[0]


def test_parquet_that_is_none(tmp_path):
    pytest.importorskip("pyarrow")
    write(tmp_path, {"a.parquet": "something else altogether"})
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file"):
        Records(find_files(str(tmp_path)))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    write(tmp_path, {"a.parquet": "x"})
    with pytest.raises(ImportError, match=r"memcache_jax\[data\]"):
        Records(find_files(str(tmp_path)))


def test_records_refuse_empty_files(tmp_path):
    write(tmp_path, {"a.txt": "", "b.jsonl": "\n\n"})
    with pytest.raises(ValueError, match=r"2 file\(s\), all empty"):
        Records(find_files(str(tmp_path)))


# The training stream.


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
    write(tmp_path, {"blank.jsonl": ' \n{"text": ""}\n'})
    with pytest.raises(ValueError, match="records with text, got 2 without any"):
        batches(Records([tmp_path / "blank.jsonl"]))


def test_stream_error_in_a_file_keeps_its_name(tmp_path):
    write(tmp_path, {"a.jsonl": '{"text": "fine"}\n{"text": 1}\n'})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        documents(batches(Records(find_files(str(tmp_path)))), 4)


# Held-out rows.


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
