"""Chat templates: as transformers has them, from a folder, and what they refuse."""

import json

import pytest

from memcache_jax.serving.http.chat import PLAIN, ChatTemplate
from memcache_jax.serving.http.errors import ApiError
from memcache_jax.training.tokenizers import FileTokenizer

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
CHATML = """{{ bos_token -}}
{% for message in messages %}
    {% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
WANTED = (
    "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def of_folder(folder):
    template = ChatTemplate.of_folder(folder)
    assert template is not None
    return template


def test_templates_of_folders(tmp_path):
    assert ChatTemplate.of_folder(tmp_path) is None
    options = tmp_path / "tokenizer_config.json"
    options.write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": None}))
    assert ChatTemplate.of_folder(tmp_path) is None
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": CHATML}]
    for source in (CHATML, named):
        options.write_text(json.dumps({"bos_token": {"content": "<s>"}, "chat_template": source}))
        assert of_folder(tmp_path).render(MESSAGES) == WANTED
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    plain = of_folder(tmp_path).render(MESSAGES)
    assert plain == "User: Hi\nAssistant: Yes?\nAssistant:"
    options.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        ChatTemplate.of_folder(tmp_path)


def test_what_is_refused():
    with pytest.raises(ValueError, match="not valid Jinja"):
        ChatTemplate("{% for %}")
    template = ChatTemplate(CHATML)
    with pytest.raises(ApiError, match="refused the messages: no tools"):
        template.render([{"role": "tool", "content": ""}])
    escape = ChatTemplate("{{ messages.__class__.__base__.__subclasses__() }}")
    with pytest.raises(ApiError, match="unsafe"):
        escape.render(MESSAGES)


def test_special_tokens_of_templates(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<|endoftext|>": 0, "<|im_start|>": 1, "u": 2, "<": 3, "|": 4}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode_marked(b"<|im_start|>u<|endoftext|>").tolist() == [1, 2, 0]
    assert 1 not in tokenizer.encode(b"<|im_start|>u")
