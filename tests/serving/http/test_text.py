"""Text as it comes: pieces are whole characters, and together what one decoding gives."""

import numpy as np
import pytest

from memcache_jax.serving.http.text import Detokenizer, Stops, Vocabulary
from memcache_jax.training.tokenizers import ByteTokenizer, FileTokenizer

decode = ByteTokenizer().decode


def told(detokenizer, tokens):
    return [*map(detokenizer.add, tokens), detokenizer.end()]


@pytest.mark.parametrize("text", ["plain", "né ", "日本語", "🙂👩‍👩‍👧", "\ufffd", ""])
def test_characters_come_whole(text):
    pieces = told(Detokenizer(decode), text.encode())
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


def test_bytes_that_are_no_text_come_too():
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens = rng.choice([0xC3, 0xA9, 0xE6, 0x97, 0xA5, 0xF0, 65, 256], size=60).tolist()
        pieces = told(Detokenizer(decode), tokens)
        assert "".join(pieces) == decode(tokens)
    endless = Detokenizer(decode)
    pieces = [endless.add(0xC3) for _ in range(1000)]
    assert len("".join(pieces)) > 900  # and does not wait for ever


def test_a_character_that_the_prompt_began():
    after = Detokenizer(decode, [110, 195])
    assert told(after, [169, 101]) == ["é", "e", ""]


def test_words_that_begin_with_a_space(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"</s>": 0, "▁the": 1, "▁cat": 2, "s": 3, "<unk>": 4, "▁": 5}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    assert told(Detokenizer(tokenizer.decode, [1]), [2, 3, 1]) == [" cat", "s", " the", ""]
    assert told(Detokenizer(tokenizer.decode), [2, 3, 1]) == ["cat", "s", " the", ""]


def test_stops():
    text = "one END two EN"
    for stops, wanted, found in [
        (["END"], "one ", True),
        (["two", " END"], "one", True),
        (["ENDS"], text, False),
        ([], text, False),
    ]:
        for size in (1, 2, 5, 20):
            scanner, got, stopped = Stops(stops), "", False
            for i in range(0, len(text), size):
                piece, stopped = scanner.add(text[i : i + size])
                got += piece
                if stopped:
                    break
            got += scanner.end()
            assert (got, stopped) == (wanted, found)


def test_names_of_tokens():
    vocabulary = Vocabulary(ByteTokenizer())
    names = [vocabulary.name(token) for token in (97, 32, 195, 256)]
    assert names == ["a", " ", "token_id:195", "<|endoftext|>"]
    assert vocabulary.encode("").tolist() == [256]
