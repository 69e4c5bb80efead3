"""Files, how they are split, and their records."""

import pickle
import sys

import pytest

from memcache_jax.training.files import Records, find_files, split_files
from tests.training.texts import write


def names(files, folder):
    return [file.relative_to(folder).as_posix() for file in files]


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
