"""`/v1/chat/completions` over HTTP."""

import pytest

from tests.serve.live import CHAT, CONTEXT, parts
from tests.serve.test_completions import alone, streamed

HI = [{"role": "user", "content": "hi"}]


def chat(live, messages=HI, **fields):
    answer = live.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 12} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def encode(text):
    return parts()[1].encode(text, add_special_tokens=False).ids


def test_continues_what_the_template_writes(live):
    messages = [{"role": "developer", "content": "Be brief."}, *HI, {"role": "assistant", "content": "yes"}, *HI]
    answer = chat(live, messages, temperature=0.8, seed=2)
    prompt = "<|system|>Be brief.<|user|>hi<|assistant|>yes<|user|>hi<|assistant|>"
    text, ids = alone(encode(prompt), 12, temperature=0.8, seed=2)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["usage"]["prompt_tokens"] == len(encode(prompt))
    assert answer["usage"]["completion_tokens"] == len(ids)
    assert "<|{{ m.role }}|>" in CHAT


def test_content_may_come_in_parts(live):
    pieces = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert chat(live, [{"role": "user", "content": pieces}])["choices"] == chat(live)["choices"]


def test_as_many_tokens_as_the_context_holds_by_default(live):
    body = {"messages": HI, "ignore_eos": True, "temperature": 0, "stop": "no such words", "logit_bias": {"70": 100}}
    answer = live.post("/v1/chat/completions", body).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == CONTEXT


def test_both_names_of_the_limit(live):
    for fields in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}):
        answer = live.post("/v1/chat/completions", {"messages": HI, "ignore_eos": True} | fields).json()
        assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("extra", [{}, {"n": 2, "temperature": 1.0, "seed": 7}, {"logprobs": True, "top_logprobs": 2}])
def test_a_stream_joined_is_the_whole(live, extra):
    body = {"messages": HI, "max_tokens": 20, "temperature": 0} | extra
    whole = chat(live, **body)
    chunks = streamed(live, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    assert chunks.pop()["usage"] == whole["usage"] | {"prompt_tokens_details": whole["usage"]["prompt_tokens_details"]}
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in mine) == choice["message"]["content"]
        assert [part["finish_reason"] for part in mine][-1] == choice["finish_reason"]
        if "logprobs" in extra:
            told = [entry for part in mine if part["logprobs"] for entry in part["logprobs"]["content"]]
            assert told == choice["logprobs"]["content"]


def test_logprobs_spell_tokens_and_bytes(live):
    answer = chat(live, logprobs=True, top_logprobs=3)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        best = entry["top_logprobs"][0]
        assert best == {key: entry[key] for key in ("token", "logprob", "bytes")}  # greedy
        if not entry["token"].startswith("bytes:"):
            assert bytes(entry["bytes"]).decode() == entry["token"]
    assert chat(live)["choices"][0]["logprobs"] is None


def test_without_a_template_it_is_a_transcript(bare):
    messages = [*HI, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]
    answer = chat(bare, messages, temperature=1.0, seed=11, max_tokens=60)
    text, _ = alone(parts()[1].encode("hi\nyes\nwhy\n").ids, 60, seed=11)
    assert answer["choices"][0]["message"]["content"] == text.lstrip().partition("\n")[0]
    assert bare.get("/v1/models").json()["data"][0]["cadre"]["chat_template"] is False


def test_an_answer_of_a_transcript_ends_with_its_line(bare):
    # Pushed to write newlines: the first are no answer, the one after text ends it.
    newline = str(parts()[1].encode("\n").ids[0])
    for seed in range(20):
        body = {"messages": HI, "temperature": 1.0, "seed": seed, "max_tokens": 60, "ignore_eos": True}
        body["logit_bias"] = {newline: 4}
        answer = bare.post("/v1/chat/completions", body).json()
        choice = answer["choices"][0]
        assert "\n" not in choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            assert answer["usage"]["completion_tokens"] < 60
            chunks = streamed(bare, "/v1/chat/completions", body)
            assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == choice["message"]["content"]
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
            break
    else:
        pytest.fail("no answer ended with its line")
    bare.until(bare.idle)


def test_an_answer_of_a_transcript_that_follows_a_grammar_is_whole(bare):
    for stream in (False, True):
        body = {"messages": HI, "guided_regex": r"yes\nno", "max_tokens": 40}
        if stream:
            chunks = streamed(bare, "/v1/chat/completions", body)
            content = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        else:
            content = chat(bare, **body)["choices"][0]["message"]["content"]
        assert content == "yes\nno"


@pytest.mark.parametrize("fields, param, says", [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not trained to call tools"),
    ({"tool_choice": "required"}, "tool_choice", "not trained to call tools"),
    ({"functions": [{"name": "f"}]}, "functions", "not trained to call tools"),
    ({"modalities": ["text", "audio"]}, "modalities", "text only"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "is not offered"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages", "tools are not offered"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}, "messages", "tools are not offered"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages", "image_url"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages", "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages", "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, "prompt", "the context is 512"),
    ({"top_logprobs": 2}, None, "top_logprobs need logprobs: true"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema belongs to"),
    ({"prompt": "x"}, "prompt", "is not a field"),
    ({"messages": [HI[0] | {"a": None, "b": 1, "c": 2}]}, "messages", "messages.0.b is not a field"),
])  # fmt: skip
def test_what_is_refused(live, fields, param, says):
    answer = live.post("/v1/chat/completions", {"messages": HI} | fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize("fields", [{"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"parallel_tool_calls": False}])
def test_asking_for_no_tools_is_fine(live, fields):
    assert chat(live, **fields)["choices"] == chat(live)["choices"]


def test_history_of_other_servers_is_taken(live):
    said = {
        "role": "assistant",
        "content": "yes",
        "refusal": None,
        "tool_calls": None,
        "audio": None,
        "annotations": [],
        "other": None,
    }
    plain = {"role": "assistant", "content": "yes"}
    assert chat(live, [*HI, said, *HI])["choices"] == chat(live, [*HI, plain, *HI])["choices"]
