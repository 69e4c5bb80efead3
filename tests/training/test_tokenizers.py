"""Tokenizers: what they encode, what they refuse."""

import pickle
import sys

import numpy as np
import pytest

from memcache_jax.training.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    added_text,
    end_token_of,
    make_tokenizer,
)

TEXT = "The cat sat on the mat; the mätress was flat.\n"


@pytest.fixture
def hf():
    return pytest.importorskip("tokenizers")


@pytest.fixture
def bpe_file(hf, tmp_path):
    """A byte-level BPE with an end token, which can write every text."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    path = tmp_path / "bpe.json"
    tokenizer.save(str(path))
    return path


def word_file(hf, folder, vocab, change=lambda tokenizer: None):
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token=next(iter(vocab))))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    change(tokenizer)
    path = folder / "words.json"
    tokenizer.save(str(path))
    return path


def test_bytes_round_trip():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(TEXT.encode())
    assert ids.dtype == np.int32
    assert ids.tolist() == list(TEXT.encode())
    assert tokenizer.decode(np.append(ids, tokenizer.eos_id)) == TEXT


def test_bytes_decode_replaces_what_is_not_utf8_and_drops_ids_beyond_bytes():
    assert ByteTokenizer().decode([104, 255, 256, 300, 105]) == "h�i"


def test_file_round_trip(bpe_file):
    tokenizer = FileTokenizer(bpe_file)
    ids = tokenizer.encode(TEXT.encode())
    assert ids.dtype == np.int32
    assert len(ids) < len(TEXT)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(np.append(ids, tokenizer.eos_id)) == TEXT
    assert tokenizer.num_replaced_documents == 0


def test_file_pickles(bpe_file):
    tokenizer = FileTokenizer(bpe_file)
    copy = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(copy.encode(b"the cat"), tokenizer.encode(b"the cat"))


def test_text_of_the_end_token_stays_text(hf, bpe_file):
    text = "a<|endoftext|>b <|endoftext|>"
    for tokenizer in (FileTokenizer(bpe_file), pickle.loads(pickle.dumps(FileTokenizer(bpe_file)))):
        ids = tokenizer.encode(text.encode())
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(np.append(ids, tokenizer.eos_id)) == text
    # A token that was added as a word of text.
    inner = hf.Tokenizer.from_file(str(bpe_file))
    inner.add_tokens(["END"])
    inner.save(str(bpe_file))
    tokenizer = FileTokenizer(bpe_file, eos_token="END")
    assert tokenizer.eos_id == inner.token_to_id("END")
    assert tokenizer.eos_id not in tokenizer.encode(b"the END")
    assert tokenizer.decode(tokenizer.encode(b"the END")) == "the END"


@pytest.mark.parametrize("bytes_of", ["", ">"])
def test_text_of_an_end_token_that_is_a_word_of_the_vocabulary(hf, tmp_path, bytes_of):
    pieces = ["?", "</s>", *sorted(set("▁abc</s>") - set(bytes_of))]
    pieces += [f"<0x{ord(character):02X}>" for character in bytes_of]
    tokenizer = hf.Tokenizer(
        hf.models.Unigram([(piece, -1.0) for piece in pieces], 0, bool(bytes_of))
    )
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    tokenizer.decoder = hf.decoders.Sequence(
        [hf.decoders.ByteFallback(), hf.decoders.Metaspace(), hf.decoders.Fuse()]
    )
    tokenizer.save(str(tmp_path / "unigram.json"))
    assert 1 in tokenizer.encode("a</s>b").ids
    tokenizer = FileTokenizer(tmp_path / "unigram.json")
    ids = tokenizer.encode(b"a</s>b </s>c")
    assert tokenizer.eos_id == 1
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a</s>b </s>c"


def test_file_replaces_and_counts_invalid_bytes(bpe_file):
    tokenizer = FileTokenizer(bpe_file)
    ids = tokenizer.encode(b"caf\xe9 and \xff")
    tokenizer.encode(b"fine")
    assert tokenizer.decode(ids) == "caf� and �"
    assert tokenizer.num_replaced_documents == 1


def test_vocab_size_covers_the_largest_id(hf, tmp_path):
    tokenizer = FileTokenizer(word_file(hf, tmp_path, {"a": 0, "b": 9, "</s>": 3}))
    assert tokenizer.vocab_size == 10
    assert tokenizer.eos_id == 3


def test_file_settings_that_would_change_documents_are_off(hf, tmp_path):
    def change(tokenizer):
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=8)
        tokenizer.post_processor = hf.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )

    path = word_file(hf, tmp_path, {"a": 0, "</s>": 1}, change)
    assert FileTokenizer(path).encode(b"a a a").tolist() == [0, 0, 0]


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token": 3}', '{"eos_token": {"content": 3}}'])
def test_what_names_no_end_token_is_an_error_with_the_file(tmp_path, text):
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        end_token_of(tmp_path)


def test_eos_token_by_name(hf, tmp_path):
    path = word_file(hf, tmp_path, {"a": 0, "END": 1})
    assert FileTokenizer(path, eos_token="END").eos_id == 1
    with pytest.raises(ValueError, match=r"looked for .*<eos>.*pass eos_token="):
        FileTokenizer(path)
    with pytest.raises(ValueError, match="looked for STOP"):
        FileTokenizer(path, eos_token="STOP")


def test_added_text_keeps_the_space_before_a_word(hf, tmp_path):
    tokenizer = hf.Tokenizer(hf.models.WordLevel({"?": 0, "</s>": 1, "▁the": 2, "▁cat": 3}, "?"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    tokenizer.decoder = hf.decoders.Metaspace()
    tokenizer.save(str(tmp_path / "words.json"))
    tokenizer = FileTokenizer(tmp_path / "words.json")
    assert tokenizer.decode([3]) == "cat"
    assert added_text(tokenizer, np.array([1, 2]), [3, 3, 1]) == " cat cat"
    assert added_text(tokenizer, [1], [3]) == "cat"


def test_refuses_a_missing_file():
    with pytest.raises(ValueError, match="'bytes' or a file, got 'byte'"):
        make_tokenizer("byte")


def test_refuses_a_file_that_is_no_tokenizer(hf, tmp_path):
    path = tmp_path / "no.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"no\.json is not a Hugging Face tokenizers JSON file"):
        FileTokenizer(path)


def test_missing_package_is_named(monkeypatch, tmp_path):
    path = tmp_path / "some.json"
    path.write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="needs the package tokenizers: pip install tokenizers"):
        FileTokenizer(path)


def test_make_tokenizer(bpe_file):
    assert make_tokenizer("bytes", vocab_size=257).name == "bytes"
    assert make_tokenizer(str(bpe_file), vocab_size=300).name == str(bpe_file)
    with pytest.raises(ValueError, match="fixed end token"):
        make_tokenizer("bytes", eos_token="</s>")


def test_make_tokenizer_refuses_more_ids_than_the_model_has():
    with pytest.raises(ValueError, match=r"257 ids.*vocab_size is 256"):
        make_tokenizer("bytes", vocab_size=256)
