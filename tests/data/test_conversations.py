"""Conversations as training text: what is learned of them is what transformers marks as the assistant's."""

import json
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.runs import write_chats
from transformers import PreTrainedTokenizerFast

from cadre.data.conversations import messages_of, template_of, written
from cadre.data.prepare import prepare
from cadre.data.shards import TokenData
from cadre.data.sources import Document, read_documents
from cadre.data.tokenizer import train_tokenizer
from cadre.errors import UsageError
from cadre.hub.template import CONVERSED_TEMPLATE, ChatTemplate
from cadre.hub.tokenizer import save_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Naïve?"},
    {"role": "assistant", "content": "Oui, 你好 😀"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]
OURS = template_of(None)
# In the manner of published ones: it begins with bos, and an answer ends with a token and a line.
THEIRS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["Be brief. Naïve? So. Why? 你好"] * 9, 300), folder)
    return folder


def write(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def only(source, template=OURS):
    (document,) = read_documents(source, template)
    return document


def said(document):
    return [document.text[first:last] for first, last in document.answers]


def learned_text(data: TokenData, part="train"):
    """The text of the learned tokens of each document, special tokens written out."""
    tokens = getattr(data, part)
    ends = [*tokens.document_starts[1:], len(tokens)]
    for start, end in zip(tokens.document_starts, ends, strict=True):
        ids, mask = tokens.tokens(start, end), tokens.mask(start, end)
        yield data.tokenizer.decode(ids[mask], skip_special_tokens=False)


def test_what_the_assistant_says_is_learned_with_the_token_that_ends_it(tmp_path):
    document = only(write(tmp_path / "a.jsonl", {"messages": CHAT}))
    assert document.text == ("Be brief.<|user|>Naïve?<|assistant|>Oui, 你好 😀<|eos|><|user|>Why?<|assistant|>So.<|eos|>")
    assert said(document) == ["Oui, 你好 😀<|eos|>", "So.<|eos|>"]


@pytest.mark.parametrize("parquet", [False, True])
def test_what_has_weight_0_is_read_and_not_learned(tmp_path, parquet):
    weights = [0, None, 0, 0, 1]  # of what the assistant does not say none counts
    messages = [{**message, "weight": weight} for message, weight in zip(CHAT, weights, strict=True)]
    if parquet:
        pq.write_table(pa.table({"messages": [messages]}), tmp_path / "a.parquet")
        document = only(str(tmp_path / "a.parquet"))
    else:
        document = only(write(tmp_path / "a.jsonl", {"messages": messages}))
    assert document.text == only(write(tmp_path / "b.jsonl", {"messages": CHAT})).text
    assert said(document) == ["So.<|eos|>"]


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=8)), min_size=1, max_size=6))
def test_it_is_what_transformers_marks(tokenizer_dir, turns):
    messages = [{"role": role, "content": content} for role, content in [*turns, ("assistant", "yes")]]
    text, answers = written(messages, OURS(), "here")
    theirs = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    said = "message['content'] + eos_token"
    marks = CONVERSED_TEMPLATE.replace(f"+ {said} }}}}", f"}}}}{{% generation %}}{{{{ {said} }}}}{{% endgeneration %}}")
    assert marks != CONVERSED_TEMPLATE
    marked = theirs.apply_chat_template(messages, chat_template=marks, return_dict=True, return_assistant_tokens_mask=True)
    assert ChatTemplate(CONVERSED_TEMPLATE, OURS().special).render(messages) == OURS().render(messages)
    encoding = theirs.backend_tokenizer.encode(text, add_special_tokens=False)
    assert encoding.ids == marked["input_ids"]
    assert Document("", text, answers=answers).learned(encoding.offsets) == [bool(mark) for mark in marked["assistant_masks"]]


def test_parquet_and_other_fields_are_read_alike(tmp_path):
    rows = [[{**message, "tool": None, "tool_calls": None} for message in CHAT]]
    pq.write_table(pa.table({"messages": rows, "id": [3]}), tmp_path / "a.parquet")
    lines = write(tmp_path / "a.jsonl", {"id": 3, "messages": [{**message, "tool": None} for message in CHAT]})
    one, other = only(str(tmp_path / "a.parquet")), only(lines)
    assert (one.text, one.answers) == (other.text, other.answers)
    assert one.answers


def test_shards_tell_which_tokens_are_learned(tmp_path):
    plain = [{"text": f"Number {i} is <|eos|> no end. " * 3} for i in range(6)]
    data = prepare(write(tmp_path / "a.jsonl", *plain, *({"messages": CHAT[i % 3 :]} for i in range(3))), held_out=0)
    *texts, first, second, third = learned_text(data)
    assert texts == [record["text"] + "<|eos|>" for record in plain]  # all of it, and no special token within
    assert first == second == third == "Oui, 你好 😀<|eos|>So.<|eos|>"
    assert np.count_nonzero(data.train.tokens(0, len(data.train)) == 1) == 6 + 3 * 2
    assert data.manifest["train"]["learned"] == data.train.mask(0, len(data.train)).sum()
    again = TokenData.open(data.path)
    assert again.chat_template.source == data.chat_template.source and again.train.masked
    middle = len(data.train) // 2
    halves = [data.train.part(0, middle), data.train.part(middle, len(data.train))]
    np.testing.assert_array_equal(
        np.concatenate([half.mask(0, len(half)) for half in halves]), data.train.mask(0, len(data.train))
    )


def test_text_without_conversations_needs_no_masks(tmp_path):
    data = prepare(write(tmp_path / "a.jsonl", *({"text": f"Number {i}."} for i in range(9))))
    assert data.chat_template is None and not data.train.masked and not list(data.path.glob("*.mask"))
    assert data.train.mask(0, 5).all()


def test_held_out_conversations_come_back_as_they_were(tmp_path):
    source = str(write_chats(tmp_path / "a.jsonl"))
    data = prepare(source, held_out=0.2)
    held = list(data.read_held_out())
    assert len(held) == 8 and data.manifest["held_out"]["learned_bytes"] == sum(d.learned_bytes for d in held)
    every = {document.name: document for document in read_documents(source, OURS)}
    assert all(every[document.name] == document for document in held)
    again = list(read_documents(str(data.path / "held_out.jsonl"), lambda: None))
    assert [(document.text, document.answers) for document in again] == [(document.text, document.answers) for document in held]
    assert ["".join(said(document)) for document in held] == list(learned_text(data, "held_out"))


def test_a_template_beside_the_tokenizer_comes_first(tmp_path, tokenizer_dir):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    config = {"chat_template": THEIRS, "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    source = write(tmp_path / "a.jsonl", {"messages": CHAT[1:]})
    for tokenizer in (folder, folder / "tokenizer.json"):
        data = prepare(source, tokenizer=tokenizer, held_out=0)
        assert data.chat_template.source == THEIRS
        ids = data.train.tokens(0, len(data.train))
        assert data.tokenizer.decode(ids, skip_special_tokens=False) == (
            "<|bos|><|user|>Naïve?<|assistant|>Oui, 你好 😀<|eos|>\n<|user|>Why?<|assistant|>So.<|eos|>\n<|eos|>"
        )
        assert list(learned_text(data)) == ["Oui, 你好 😀<|eos|>\nSo.<|eos|>\n"]  # what separates documents is nobody's answer


@pytest.mark.parametrize("end, learned", [("", "So.<|eos|>"), ("<|user|>\n", "So.<|user|>\n")])
def test_what_separates_documents_ends_an_answer_that_has_no_end_of_its_own(tmp_path, tokenizer_dir, end, learned):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    template = "{% for m in messages %}{{ m.content + '" + end + "' }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    source = write(tmp_path / "a.jsonl", {"messages": CHAT[3:]})
    data = prepare(source, tokenizer=tmp_path, held_out=0)
    assert list(learned_text(data)) == [learned]
    assert data.answer_ends == ([2] if end else [])


def test_a_text_is_the_same_every_day(tmp_path):
    source = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(source)
    assert only(write(tmp_path / "a.jsonl", {"messages": CHAT}), template_of(tmp_path)).text.startswith("01")
    assert ChatTemplate(source, {}, lambda: datetime(2026, 3, 9)).render(CHAT).startswith("09")


def test_the_template_of_a_run_lies_beside_its_models_tokenizer(tmp_path, tokenizer_dir):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    source = write(tmp_path / "a.jsonl", {"messages": CHAT})
    assert only(source, template_of(tmp_path)).text == only(source, template_of(tmp_path / "model")).text
    assert ";" in only(source, template_of(tmp_path)).text


@pytest.mark.parametrize("value, message", [
    ("hi", '"messages" must be a list of objects'),
    ([], '"messages" must be a list of objects'),
    ([3], 'message 1 of 1 has no "role" and "content"'),
    ([CHAT[1], {"role": "assistant"}], 'message 2 of 2 has no "role" and "content"'),
    ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "that are strings"),
    (CHAT[:2], "no message is the assistant's"),
    ([CHAT[1], {**CHAT[2], "weight": 0}], "all messages of the assistant's have weight 0"),
    ([CHAT[1], {**CHAT[2], "weight": 0.5}], "message 2 of 2 has weight 0.5; it must be 0 or 1, or absent"),
    ([CHAT[1], {**CHAT[2], "weight": True}], "message 2 of 2 has weight True; it must be 0 or 1"),
    ([CHAT[1], {**CHAT[2], "weight": "0"}], "message 2 of 2 has weight '0'; it must be 0 or 1"),
    ([CHAT[1], {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}], "message 2 of 2 calls a tool"),
])  # fmt: skip
def test_what_is_no_conversation_is_refused(tmp_path, value, message):
    with pytest.raises(UsageError, match=message):
        messages_of(value, "a.jsonl:1")
    with pytest.raises(UsageError, match=rf"a\.jsonl:2: .*{message}"):
        list(read_documents(write(tmp_path / "a.jsonl", {"text": "x"}, {"messages": value}), OURS))


def test_no_template_and_damaged_ones_matter_to_conversations_alone(tmp_path, tokenizer_dir):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    chats, plain = write(tmp_path / "a.jsonl", {"messages": CHAT}), write(tmp_path / "b.jsonl", {"text": "So. Why?"})
    with pytest.raises(UsageError, match=r"a\.jsonl:1: is a conversation, and the tokenizer's folder has no chat template"):
        prepare(chats, tokenizer=folder)
    with pytest.raises(UsageError, match="no chat template"):
        list(read_documents(chats))
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UsageError, match="does not parse"):
        prepare(chats, tokenizer=folder)
    assert prepare(plain, tokenizer=folder, held_out=0).manifest["train"]["documents"] == 1


@pytest.mark.parametrize("source, message", [
    ("{% for m in messages[-2:] %}{{ m.content }}{% endfor %}", "writes message 3 otherwise"),  # forgets what was said
    ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "writes message 3 otherwise"),
    ("{{ raise_exception('no') }}", "refuses these messages: no"),
])  # fmt: skip
def test_templates_that_cannot_be_learned_from(source, message):
    with pytest.raises(UsageError, match=f"a:1: .*{message}"):
        written(CHAT, ChatTemplate(source, {}), "a:1")


@given(st.data())
def test_a_part_of_a_conversation_is_its_letters_and_their_answers(data):
    text, answers = written(CHAT, OURS(), "here")
    whole = Document("", text, answers=answers)
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, len(text)))
    letters = [(place, place + 1) for place in range(len(text))]
    part = whole.part(start, stop)
    assert part.text == text[start:stop]
    assert part.learned(letters[: stop - start]) == whole.learned(letters)[start:stop]
    marked = zip(part.text, part.learned(letters), strict=False)
    assert part.learned_bytes == sum(len(letter.encode()) for letter, counts in marked if counts)
