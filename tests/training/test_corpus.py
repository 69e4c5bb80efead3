"""The corpus of a run: its files and its tokenizer."""

import json

import pytest

from memcache_jax.training import train


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


def test_bytes_that_are_not_utf8_are_fine(config, corpus_folder, tmp_path, caplog):
    for file in corpus_folder.iterdir():
        file.write_bytes(file.read_bytes() + b"\xff\xfe")
    train(config, tmp_path / "run")
    assert "UTF-8" not in caplog.text


def test_a_tokenizer_with_too_many_ids_is_told(config, tmp_path, word_tokenizer):
    config.data.tokenizer, config.model.vocab_size = str(word_tokenizer), 4
    with pytest.raises(ValueError, match="has 5 ids, but the model's vocab_size is 4"):
        train(config, tmp_path / "run")


def test_jsonl_with_a_named_field(config, tmp_path):
    for i in range(4):
        lines = [json.dumps({"body": f"{i} apples, {j} pears. " * 9}) for j in range(5)]
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines))
    config.data.files = (str(tmp_path / "*.jsonl"),)
    config.data.text_field = "body"
    assert train(config, tmp_path / "run")["step"] == 6
