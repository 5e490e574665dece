import json

import pytest
from transformers import PreTrainedTokenizerFast

from cadre.data.tokenizer import train_tokenizer
from cadre.errors import UsageError
from cadre.hub.template import ChatTemplate, chat_template, template_source
from cadre.hub.tokenizer import save_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be {{ brief }}."},
    {"role": "user", "content": "naïve?\n"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "<b>why</b>"},
]
# In the manner of published ones: whitespace control, loop controls, filters, refusals.
TEMPLATES = [
    """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    <|{{ message['role'] }}|>
    {{ message['content'] | trim }}{{ eos_token if loop.last else '' }}
{%- endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}""",
    "{{ messages | tojson }}{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}{% endfor %}",
    "{% if tools is not none or documents is not none %}[TOOLS]{% endif %}{{ messages[0].content if tools is defined }}",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(train_tokenizer(["yes no why"], 300), folder)
    return folder


def with_config(directory, folder, **changes):
    """A copy of the tokenizer's files with other values in tokenizer_config.json."""
    values = json.loads((directory / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def test_our_own_template_writes_what_transformers_writes(directory):
    wanted = PreTrainedTokenizerFast.from_pretrained(directory).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert chat_template(directory).render(MESSAGES) == wanted


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_others_write_what_transformers_writes(directory, tmp_path, source, wrapped):
    chat = [{"name": "tools", "template": "no"}, {"name": "default", "template": source}] if wrapped else source
    eos = {"__type": "AddedToken", "content": "<|eos|>", "special": True}
    folder = with_config(directory, tmp_path, chat_template=chat, eos_token=eos)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert chat_template(folder).render(MESSAGES) == tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("config", [{}, {"eos_token": "<|user|>"}, {"eos_token": "<|user|>", "added_tokens_decoder": {}}])
def test_special_tokens_of_a_file_of_their_own(directory, tmp_path, config):
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    folder = with_config(directory, tmp_path, **({"eos_token": None, "chat_template": source} | config))
    bos = {"content": "<|bos|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": bos, "eos_token": "<|eos|>"}))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert chat_template(folder).render(MESSAGES) == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_a_file_of_its_own_comes_first(directory, tmp_path):
    folder = with_config(directory, tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert chat_template(folder).render(MESSAGES) == "Be {{ brief }}.!"


@pytest.mark.parametrize("chat", [None, "", [], [{"name": "tools", "template": "x"}], 3])
def test_none(directory, tmp_path, chat):
    assert chat_template(with_config(directory, tmp_path, chat_template=chat)) is None


def test_none_without_any_file(tmp_path):
    assert chat_template(tmp_path) is None


@pytest.mark.parametrize("name", [{}, [], None, 3])
def test_a_template_of_an_odd_name_is_passed_over(tmp_path, name):
    templates = [{"name": name, "template": "x"}, {"name": "default", "template": "D"}, 3]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert template_source(tmp_path)[0] == "D"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates[:1]}))
    assert template_source(tmp_path)[0] is None


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        chat_template(tmp_path)


def test_one_that_does_not_parse():
    with pytest.raises(UsageError, match="does not parse"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize("source, reason", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages[0].content + 3 }}", "can only concatenate"),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
])  # fmt: skip
def test_what_it_refuses_is_bad_input(source, reason):
    with pytest.raises(UsageError, match=f"refuses these messages: .*{reason}"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])


def test_a_mark_of_what_an_assistant_says():
    """For training; here it is what it holds."""
    source = (
        "{% for message in messages %}{% generation %}{{ message.content }}{% endgeneration %}{% endfor %}"
        "{{ messages[0].content | tojson(ensure_ascii=True) }}{{ messages[1].content | tojson }}"
    )
    assert ChatTemplate(source, {}).render(MESSAGES[:2]) == 'Be {{ brief }}.naïve?\n"Be {{ brief }}.""naïve?\\n"'
