"""Records: the documents of files by number, what cannot be read, and parts of one file."""

import bz2
import gzip
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from memcache_jax.training.files import find_files
from memcache_jax.training.records import Records
from tests.training.texts import write


def test_text_files_are_one_record_each_and_empty_ones_none(tmp_path):
    folder = write(tmp_path, {"a.txt": "a\n\nb", "b.md": "", "c.bin": b"\xff\xfe", "d.py": "d"})
    records = Records(find_files(str(folder)))
    assert [records[i] for i in range(len(records))] == [[b"a\n\nb"], [b"\xff\xfe"], [b"d"]]
    with pytest.raises(IndexError):
        records[3]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_jsonl_is_one_record_per_line(tmp_path, monkeypatch, chunk, end):
    monkeypatch.setattr("memcache_jax.training.records._CHUNK", chunk)
    lines = ['{"text": "é\\n1"}', "", '{"text": "2", "id": 2}', '{"text": "3"}']
    folder = write(tmp_path, {"0.txt": "0", "a.jsonl": "\n".join(lines) + end, "b.txt": "b"})
    records = pickle.loads(pickle.dumps(Records(find_files(str(folder)))))
    read = [records[i] for i in range(len(records))]
    assert read == [[b"0"], ["é\n1".encode()], [b"2"], [b"3"], [b"b"]]


def test_threads_read_compressed_lines(tmp_path):
    lines = "".join(json.dumps({"text": str(i) * 50}) + "\n" for i in range(200))
    folder = write(tmp_path, {"a.jsonl.gz": gzip.compress(lines.encode())})
    records = Records(find_files(str(folder)))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(records.__getitem__, [*range(200)] * 10))
    assert read == [[str(i).encode() * 50] for i in range(200)] * 10


def test_jsonl_blank_empty_and_null_lines_are_no_documents(tmp_path):
    folder = write(tmp_path, {"a.jsonl": '{"t": "1"}\r\n\r\n  \n{"t": ""}\n{"t": null}\n'})
    records = Records(find_files(str(folder)), text_field="t")
    assert [text for i in range(len(records)) for text in records[i]] == [b"1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x"}', "expected an object with the field 'text'"),
        ('["text"]', "expected an object with the field 'text'"),
        ('{"text": 3}', "expected text, got 3"),
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
    assert "skip such lines with data.skip_bad_lines=True" in str(error.value)
    skipping = Records(find_files(str(folder)), skip_bad_lines=True)
    for _ in range(2):
        assert [text for i in range(3) for text in skipping[i]] == [b"1", b"2"]
    assert list(skipping.skipped) == [2]
    assert f"{folder / 'a.jsonl'}:4: " in skipping.skipped[2]


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
    with pytest.raises(ValueError, match=r"a\.parquet is damaged, or no Parquet file"):
        Records(find_files(str(tmp_path)))


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    write(tmp_path, {"a.parquet": "x"})
    with pytest.raises(ImportError, match="needs pyarrow: pip install pyarrow"):
        Records(find_files(str(tmp_path)))


def test_records_refuse_empty_files(tmp_path):
    write(tmp_path, {"a.txt": "", "b.jsonl": "\n\n"})
    with pytest.raises(ValueError, match=r"2 file\(s\), all empty"):
        Records(find_files(str(tmp_path)))


def everything(records):
    return [text for i in range(len(records)) for text in records[i]]


def test_compressed_files_are_read_as_what_they_hold(tmp_path):
    lines = b'\n{"text": "1"}\n\n{"text": "2"}\nnone'
    files = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "b.jsonl.bz2": bz2.compress(b'{"text": "3"}'),
        "c.jsonl": b'{"text": "4"}\n',
        "d.txt.GZ": gzip.compress(b"5 and"),
        "e.gz": gzip.compress(b"6") + gzip.compress(b"7"),
    }
    records = Records(find_files(str(write(tmp_path, files))), skip_bad_lines=True)
    assert everything(records) == [b"1", b"2", b"1", b"2", b"3", b"4", b"5 and", b"67"]
    assert everything(records) == [b"1", b"2", b"1", b"2", b"3", b"4", b"5 and", b"67"]
    places = [skipped.split(": ")[0] for skipped in records.skipped.values()]
    assert places == [f"{tmp_path / name}:5" for name in ("a.jsonl", "a.jsonl.gz")]
    assert list(records.lines.values()) == [3, 3, 1, 1]


def test_a_line_nested_beyond_what_can_be_read(tmp_path):
    write(tmp_path, {"a.jsonl": "[" * 100_000 + "\n"})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: .*recursion"):
        Records(find_files(str(tmp_path)))[0]


def both(path, fraction=0.3):
    train, heldout = Records([path]).split(fraction)
    return everything(train), everything(heldout)


def test_lines_of_one_file_are_split(tmp_path):
    texts = [f"text {i}" for i in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train, heldout = both(path)
    assert sorted(train + heldout) == sorted(text.encode() for text in texts)
    assert 30 <= len(heldout) <= 90
    # Lines that come later move no others, and each side has one.
    with path.open("a") as f:
        f.write("".join(f'\n{{"text": "later {i}"}}' for i in range(50)))
    assert set(heldout) < set(both(path)[1])
    assert [len(side) for side in both(path, 1e-9)] == [249, 1]
    assert [len(side) for side in both(path, 1 - 1e-9)] == [1, 249]


def test_rows_of_one_table_are_split(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i}" if i % 5 else None for i in range(100)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=30)
    train, heldout = both(tmp_path / "a.parquet")
    assert sorted(train + heldout) == sorted(text.encode() for text in texts if text)
    assert 12 <= len(heldout) <= 40


@pytest.mark.parametrize(
    ("text", "heldout"),
    [
        ("line\n" * 100, "line\n" * 30),
        ("a line\nof words alone " * 10, "a line\nof words alone " * 3),
        ("words " * 50 + "\n", "words " * 15 + "\n"),
        ("ä" * 101, "ä" * 30),
        ("x", "x"),
    ],
)
def test_the_end_of_a_text_that_stands_alone_is_held_out(tmp_path, text, heldout):
    train, end = both(write(tmp_path, {"a.txt": text}) / "a.txt")
    assert b"".join(train + end).decode() == text
    assert abs(len(end[0].decode()) - len(heldout)) <= 22
    assert text.endswith(heldout)


def test_several_files_are_not_split_by_document(tmp_path):
    records = Records(find_files(str(write(tmp_path, {"a.txt": "a", "b.txt": "b"}))))
    with pytest.raises(ValueError, match="a single file to split, got 2"):
        records.split(0.1)
