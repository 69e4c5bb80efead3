"""Conversations: what answers hold, and what does not end them."""

import pytest
from flax import nnx

import memcache_jax as mc
from experiments._conversation import converse, print_continuation
from memcache_jax.training.tokenizers import ByteTokenizer, FileTokenizer


@pytest.fixture(scope="module")
def model():
    mixers = (mc.nn.AttentionMixer(),)
    config = mc.nn.LanguageModelConfig(257, 1, 16, 2, mixers=mixers, mlp_features=0)
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    # What it generates is ASCII.
    model.head.kernel[...] = model.head.kernel[...].at[:, 127:].set(0.0) * 9
    return model


@pytest.mark.slow
def test_a_line_that_cannot_be_read_ends_nothing(model, capsys):
    decoder = mc.Decoder(model, max_length=40, temperature=0)

    def say(*lines):
        converse(decoder, ByteTokenizer(), lines, max_new_tokens=4, stop=False)
        return capsys.readouterr()

    first = say(b"hi\n", b"\n", b"never read\n")
    assert len(first.out.rstrip("\n")) == 4
    assert decoder.cache.position.tolist() == [7]
    told = say(b"caf\xe9\n", b"x" * 60 + b"\n", b"ok\n")
    assert told.err.count("That line was not read: ") == 2
    assert "can't decode byte 0xe9" in told.err
    assert "holds 40 tokens in a row and would have 68" in told.err
    assert decoder.cache.position.tolist() == [14]
    # An answer ends where there is no more room.
    last = say(b"x" * 23 + b"\n", b"y\n")
    assert decoder.cache.position.tolist() == [40]
    assert last.err.startswith("The conversation is at its end")
    assert last.err.count("That line was not read: ") == 1


def test_an_answer_keeps_the_space_before_its_first_word(tmp_path, capsys):
    hf = pytest.importorskip("tokenizers")
    vocab = {"?": 0, "</s>": 1, "▁the": 2, "▁cat": 3, "▁sat": 4, "▁on": 5}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocab, "?"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    tokenizer.decoder = hf.decoders.Metaspace()
    tokenizer.save(str(tmp_path / "words.json"))
    tokenizer = FileTokenizer(tmp_path / "words.json")
    prompt = tokenizer.encode(b"the cat")
    print_continuation(tokenizer, iter([4, 5]), prompt)
    assert capsys.readouterr().out == " sat on\n"
    print_continuation(tokenizer, iter([4, 5]), prompt, with_prompt=True)
    assert capsys.readouterr().out == "the cat sat on\n"
