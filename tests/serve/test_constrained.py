"""Answers held to a JSON schema or a regular expression, over HTTP."""

import json
import re

import jsonschema
import pytest

from tests.serve.test_completions import streamed

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "guests": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "guests"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "party", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize("fields", [
    {"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}, {"response_format": FORMAT},
])  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_completions_follow_a_schema(live, fields, seed):
    answer = live.complete("The party: ", max_tokens=200, temperature=1.0, seed=seed, **fields)
    assert answer["choices"][0]["finish_reason"] == "stop"
    jsonschema.validate(json.loads(answer["choices"][0]["text"]), SCHEMA)


def test_chat_follows_a_schema_streamed_or_not_for_every_choice(live):
    body = {"messages": [{"role": "user", "content": "a party"}], "response_format": FORMAT, "n": 3, "seed": 1}
    answer = live.post("/v1/chat/completions", body).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 3
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    chunks = streamed(live, "/v1/chat/completions", body)
    for index, text in enumerate(texts):
        mine = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(mine) == text


def test_any_object(live):
    fields = {"response_format": {"type": "json_object"}, "max_tokens": 300, "temperature": 1.0}
    for seed in range(8):
        choice = live.complete("x", seed=seed, **fields)["choices"][0]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)
            break
        assert choice["text"].lstrip().startswith("{")
    else:
        pytest.fail("no object was finished")


@pytest.mark.parametrize("pattern", [r"(yes|no|we do){1,3}", r"[a-z]{3,9} \d{4}-\d\d", r"café|你好"])
def test_a_regular_expression(live, pattern):
    for seed in range(3):
        choice = live.complete("x", guided_regex=pattern, max_tokens=100, temperature=1.0, seed=seed)["choices"][0]
        assert choice["finish_reason"] == "stop" and re.fullmatch(pattern, choice["text"])


def test_plain_text_is_no_constraint(live):
    assert live.complete(response_format={"type": "text"})["choices"] == live.complete()["choices"]


@pytest.mark.parametrize("fields, says", [
    ({"guided_json": "{"}, "not valid JSON"),
    ({"guided_json": {"type": "no such type"}}, "json_schema"),
    ({"guided_json": {"enum": []}}, "json_schema"),
    ({"guided_regex": "("}, "regex cannot be used"),
    ({"guided_json": {"$ref": "#"}}, "json_schema"),
    ({"guided_regex": "x" * 70_000}, "guided_regex"),
    ({"response_format": {"type": "xml"}}, "response_format"),
])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(live, fields, says, stream):
    answer = live.post("/v1/completions", {"prompt": "x", "stream": stream} | fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and says in error["message"] and len(error["message"]) < 400
    live.until(live.idle)
