"""The corpus of a run: its files and its tokenizer."""

import gzip
import json
import logging

import pytest

from memcache_jax.training import train
from memcache_jax.training.corpus import ReadingTroubles, load_corpus, mended_files


def test_an_empty_folder_is_told(config, tmp_path):
    (tmp_path / "empty").mkdir()
    config.data.files = (str(tmp_path / "empty"),)
    with pytest.raises(ValueError, match=r"found no files: .*empty' is an empty folder"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_files_are_told(config, tmp_path):
    config.data.files = ()
    with pytest.raises(ValueError, match=r"data.files names no files: set --config.data.files="):
        train(config, tmp_path / "run")


@pytest.fixture
def word_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"</s>": 0, "?": 1, "apples": 2, "pears": 3, "and": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.slow
def test_text_that_is_not_utf8_is_counted(config, corpus_folder, tmp_path, word_tokenizer, caplog):
    for file in corpus_folder.iterdir():
        file.write_bytes(file.read_bytes() + b"\xff")
    config.data.tokenizer, config.model.vocab_size = str(word_tokenizer), 5
    train(config, tmp_path / "run")
    assert (
        "documents read by this process were not UTF-8; their invalid bytes were replaced"
        in caplog.text
    )
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == word_tokenizer.read_bytes()


@pytest.mark.slow
def test_bytes_that_are_not_utf8_are_fine(config, corpus_folder, tmp_path, caplog):
    for file in corpus_folder.iterdir():
        file.write_bytes(file.read_bytes() + b"\xff\xfe")
    train(config, tmp_path / "run")
    assert "UTF-8" not in caplog.text


def test_a_tokenizer_with_too_many_ids_is_told(config, tmp_path, word_tokenizer):
    config.data.tokenizer, config.model.vocab_size = str(word_tokenizer), 4
    with pytest.raises(ValueError, match="has 5 ids, but the model's vocab_size is 4"):
        train(config, tmp_path / "run")


def mend(file, number, text):
    lines = file.read_text().split("\n")
    lines[number] = text
    file.write_text("\n".join(lines))


@pytest.fixture
def lines(config, tmp_path):
    """Four files of lines, of which the first is held out."""
    for i in range(4):
        lines = [json.dumps({"body": f"{i} apples, {j} pears. " * 9}) for j in range(5)]
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines))
    config.data.files = (str(tmp_path / "*.jsonl"),)
    config.data.heldout_files = (str(tmp_path / "0.jsonl"),)
    config.data.text_field = "body"
    return tmp_path


@pytest.mark.slow
def test_a_run_goes_on_after_a_line_was_mended(config, lines, caplog):
    assert train(config, lines / "run")["step"] == 6
    mend(lines / "2.jsonl", 3, json.dumps({"body": "Mended."}))
    config.resume, config.steps, config.data.skip_bad_lines = True, 8, True
    assert train(config, lines / "run")["step"] == 8
    assert "2.jsonl changed since the checkpoint, with as many lines" in caplog.text


def test_what_counts_as_mended(config, lines):
    before = load_corpus(config).identity
    earlier = {key: before[key] for key in ("train_files", "heldout_files", "files")}
    assert mended_files(before, before) == mended_files(earlier, before) == []
    stored = json.loads(json.dumps(before))
    mend(lines / "1.jsonl", 2, '{"body": 3}')
    mend(lines / "2.jsonl", 2, '{"body": "Mended."}')
    now = load_corpus(config).identity
    assert mended_files(stored, now) == ["1.jsonl", "2.jsonl"]
    assert mended_files(earlier, now) is None
    mend(lines / "2.jsonl", 2, '{"body": "Mended."}\n{"body": "And another."}')
    assert mended_files(stored, load_corpus(config).identity) is None
    mend(lines / "2.jsonl", 3, "")
    assert mended_files(stored, load_corpus(config).identity) == ["1.jsonl", "2.jsonl"]
    mend(lines / "0.jsonl", 1, '{"body": "Beyond the rows that are measured."}')
    assert mended_files(stored, load_corpus(config).identity) is not None
    mend(lines / "0.jsonl", 4, json.dumps({"body": "Held out. " * 30}))
    assert mended_files(stored, load_corpus(config).identity) is None


def test_compressed_files_that_were_read_as_bytes_before(config, lines):
    packed = lines / "3.jsonl.gz"
    packed.write_bytes(gzip.compress((lines / "3.jsonl").read_bytes()))
    config.data.files += (str(packed),)
    now = load_corpus(config).identity
    earlier = {key: now[key] for key in ("train_files", "heldout_files", "files")}
    assert mended_files(earlier, now) is None
    assert mended_files(now, now) == []


def test_skipped_lines_are_counted_and_named(config, lines, caplog):
    mend(lines / "0.jsonl", 0, "none")
    with pytest.raises(ValueError, match=r"0\.jsonl, line 1: .*data\.skip_bad_lines=True"):
        load_corpus(config)
    config.data.skip_bad_lines = True
    for number in range(2, 5):
        mend(lines / "3.jsonl", number, '{"text": "x"}')
    corpus = load_corpus(config)
    troubles = ReadingTroubles(corpus)
    troubles.tell()
    assert "1 lines read by this process were skipped" in caplog.text
    assert f"{lines / '0.jsonl'}:1: Expecting value" in caplog.text
    caplog.clear()
    assert sum(bool(corpus.train[i]) for i in range(len(corpus.train))) == 12
    troubles.tell()
    troubles.tell()
    assert caplog.text.count("4 lines read by this process were skipped") == 1
    assert "3.jsonl:4: expected an object with the field 'body'" in caplog.text
    assert "0.jsonl" not in caplog.text


def test_a_single_file_is_held_out_in_part(config, corpus_folder, lines, caplog):
    caplog.set_level(logging.INFO, "memcache_jax")
    config.data.heldout_files, config.data.heldout_fraction = (), 0.4
    for file in (lines / "1.jsonl", corpus_folder / "11.txt"):
        config.data.files = (str(file),)
        corpus = load_corpus(config)
        train = b" ".join(text for i in range(len(corpus.train)) for text in corpus.train[i])
        heldout = corpus.tokenizer.decode(corpus.heldout.tokens[0, :32])
        assert corpus.identity["heldout_files"] == 0
        assert len(train) > 300
        assert heldout in file.read_text()
        if file.suffix == ".jsonl":
            assert heldout.encode() not in train
    assert "1 files to train on (0.0 MB), a part of it held out" in caplog.text
