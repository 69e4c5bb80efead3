"""Files: which are found, and how they are split."""

import os

import pytest

from memcache_jax.training.files import find_files, split_files
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


def test_find_files_names_a_file_once_whatever_links_there_are(tmp_path):
    write(tmp_path, {"data.txt": "1", "other.txt": "2", "bare": "3"})
    (tmp_path / "a_link.txt").symlink_to("data.txt")
    (tmp_path / "named.txt").symlink_to("bare")
    os.link(tmp_path / "other.txt", tmp_path / "same.txt")
    assert names(find_files(str(tmp_path)), tmp_path) == ["data.txt", "named.txt", "other.txt"]
    # Another name does not bring a held-out file back.
    train, heldout = split_files(find_files(str(tmp_path)), 0.5, str(tmp_path / "a_link.txt"))
    assert names(train, tmp_path) == ["named.txt", "other.txt"]
    assert names(heldout, tmp_path) == ["a_link.txt"]


def test_find_files_in_a_cache_of_hugging_face(tmp_path):
    cache = write(tmp_path / "datasets--x", {"blobs/1f": "{}", "blobs/2e": "x", "refs/main": "ab"})
    for name, blob in {"data/train.jsonl": "1f", "README.md": "2e"}.items():
        link = cache / "snapshots" / "ab" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(cache / "blobs" / blob)
    found = ["snapshots/ab/README.md", "snapshots/ab/data/train.jsonl"]
    assert names(find_files(str(tmp_path)), cache) == found
    assert names(find_files(str(cache / "**" / "*"), "*/refs/*"), cache) == found
