"""`/v1/completions` over HTTP against what the library says."""

import json
import math
from itertools import chain

import pytest
import torch

from cadre.infer.engine import Engine, Request
from cadre.infer.sampling import Sampling
from cadre.model.scoring import document_start
from tests.serve.live import CONTEXT, parts


def alone(prompt_ids, most, stop=(), **sampling):
    """What a fresh engine makes of one sequence: (text, token ids)."""
    model, tokenizer = parts()
    engine = Engine(model, tokenizer, cache_bytes=8 << 20, max_batch=1)
    values = {"temperature": 1.0} | sampling
    engine.add(Request("x", tuple(prompt_ids), most, Sampling(**values), stop=stop))
    outputs = []
    while engine.busy:
        outputs += engine.step()
    return "".join(output.text for output in outputs), [token.id for output in outputs for token in output.tokens]


def encode(text):
    return parts()[1].encode(text).ids


def streamed(live, path, body):
    answer = live.post(path, body | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_is_what_the_engine_writes_alone(live):
    answer = live.complete("The people", max_tokens=20, seed=4, temperature=0.9, top_p=0.9, top_k=40)
    text, ids = alone(encode("The people"), 20, seed=4, temperature=0.9, top_p=0.9, top_k=40)
    choice = answer["choices"][0]
    assert choice["text"] == text
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    assert choice["index"] == 0 and choice["logprobs"] is None
    assert answer["usage"]["prompt_tokens"] == len(encode("The people"))
    assert answer["usage"]["completion_tokens"] == len(ids)
    assert answer["usage"]["total_tokens"] == len(encode("The people")) + len(ids)


@pytest.mark.parametrize("options", [
    {"temperature": 0},
    {"temperature": 1.4, "seed": 1},
    {"temperature": 0.7, "min_p": 0.2, "seed": 2},
    {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": 0.5, "seed": 3},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 0, "logit_bias": {"70": 100}},
])  # fmt: skip
def test_every_option_reaches_the_sampling(live, options):
    sampling = {key: value for key, value in options.items() if key != "logit_bias"}
    if "logit_bias" in options:
        sampling["logit_bias"] = ((70, 100.0),)
    text, _ = alone(encode("yes"), 24, **sampling)
    assert live.complete("yes", max_tokens=24, **options)["choices"][0]["text"] == text
    plain, _ = alone(encode("yes"), 24, **{key: sampling[key] for key in ("temperature", "seed") if key in sampling})
    assert len(options) < 2 or options.keys() == {"temperature", "seed"} or text != plain


def test_defaults_are_openais(live):
    answer = live.post("/v1/completions", {"prompt": "The", "seed": 9}).json()
    assert answer["choices"][0]["text"] == alone(encode("The"), 16, seed=9, temperature=1.0)[0]


def test_prompts_of_all_kinds_give_the_same(live):
    wanted = [live.complete(prompt)["choices"][0]["text"] for prompt in ("The", "yes")]
    for prompts in (["The", "yes"], [encode("The"), encode("yes")]):
        answer = live.complete(prompts)
        assert [choice["text"] for choice in answer["choices"]] == wanted
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert answer["usage"]["prompt_tokens"] == len(encode("The")) + len(encode("yes"))
    assert live.complete(encode("yes"))["choices"][0]["text"] == wanted[1]


def test_an_empty_prompt_begins_a_document(live):
    answer = live.complete("")
    assert answer["usage"]["prompt_tokens"] == 1 and answer["choices"][0]["text"]


def test_n_choices_differ_and_repeat_with_the_seed(live):
    first, again = (live.complete(["The", "yes"], n=3, seed=5, temperature=1.2, max_tokens=12) for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == list(range(6))
    assert len(set(texts)) == 6
    assert texts == [choice["text"] for choice in again["choices"]]
    assert texts[0] == alone(encode("The"), 12, seed=5, temperature=1.2)[0]
    assert texts[4] == alone(encode("yes"), 12, seed=6, temperature=1.2)[0]
    assert first["usage"]["prompt_tokens"] == len(encode("The")) + len(encode("yes"))


def test_without_a_seed_texts_differ(live):
    texts = {live.complete(temperature=1.5, max_tokens=24)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


def test_negative_seeds_are_seeds(live):
    texts = [live.complete(temperature=1.5, max_tokens=24, seed=-3)["choices"][0]["text"] for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("several", [False, True])
def test_stop_strings_end_the_text(live, several):
    text, _ = alone(encode("The"), 40, temperature=0)
    stop = text[9:12]
    answer = live.complete(max_tokens=40, stop=["nowhere at all", stop] if several else stop)
    assert answer["choices"][0]["text"] == text.partition(stop)[0]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_the_end_of_text_token_ends_it_unless_ignored(live):
    # The model is made to say its end-of-text token at once.
    ended = live.complete(logit_bias={"1": 100}, max_tokens=5)
    assert ended["choices"][0]["finish_reason"] == "stop" and ended["choices"][0]["text"] == ""
    ignored = live.complete(logit_bias={"1": 100}, max_tokens=5, ignore_eos=True)
    assert ignored["choices"][0]["finish_reason"] == "length"
    assert ignored["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    "extra", [{}, {"n": 2, "seed": 3, "temperature": 1.0}, {"echo": True}, {"logprobs": 2}, {"stop": ["e", "o"]}]
)
def test_a_stream_joined_is_the_whole(live, extra):
    body = {"prompt": ["The café 你好", "yes"], "max_tokens": 30, "temperature": 0} | extra
    whole = live.post("/v1/completions", body).json()
    chunks = streamed(live, "/v1/completions", body)
    for choice in whole["choices"]:
        parts_ = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts_) == choice["text"]
        assert [part["finish_reason"] for part in parts_ if part["finish_reason"]] == [choice["finish_reason"]]
        assert parts_[-1]["finish_reason"] == choice["finish_reason"]
        if "logprobs" in extra:
            for key, values in choice["logprobs"].items():
                assert list(chain.from_iterable(part["logprobs"][key] for part in parts_)) == values
    assert {chunk["object"] for chunk in chunks} == {"text_completion"} and len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_last_if_asked(live):
    body = {"prompt": "The", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    chunks = streamed(live, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6


def reference_logprobs(ids):
    """[T - 1, W]: what the model says of each next token."""
    with torch.inference_mode():
        return parts()[0](torch.tensor([ids]))[0, :-1].float().log_softmax(-1)


@pytest.mark.parametrize("prompt", ["The naïve café 你好", ""])
def test_logprobs_with_the_prompts(live, prompt):
    answer = live.complete(prompt, echo=True, logprobs=2, max_tokens=5, ignore_eos=True)
    choice = answer["choices"][0]
    said = choice["logprobs"]
    length = answer["usage"]["prompt_tokens"]
    tokenizer = parts()[1]
    start = encode(prompt) or [document_start(parts()[0].config, tokenizer)]
    ids = start + alone(start, 5, temperature=0)[1]
    reference = reference_logprobs(ids)
    wanted = [row[token].item() for row, token in zip(reference, ids[1:], strict=True)]
    assert {len(values) for values in said.values()} == {length + 5}
    assert said["token_logprobs"][0] is None and said["top_logprobs"][0] is None
    assert said["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-3)
    told = zip(said["top_logprobs"], said["tokens"], said["token_logprobs"], strict=True)
    for row, (top, token, logprob) in zip(reference, list(told)[1:], strict=True):
        assert top[token] == logprob and len(top) in (2, 3)
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
    if prompt:
        assert choice["text"].startswith(prompt)
    # Offsets point at each token's text, where the token is whole characters.
    visible = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for token, offset in zip(said["tokens"], said["text_offset"], strict=True):
        if not token.startswith("bytes:") and token not in visible:
            assert choice["text"][offset : offset + len(token)] == token or "�" in choice["text"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_offsets_count_the_special_tokens_of_an_echo(live, stream, as_ids):
    text = "The<|eos|> café<|eos|><|eos|> yes"
    body = {"prompt": encode(text) if as_ids else text, "echo": True, "logprobs": 0, "max_tokens": 6, "ignore_eos": True}
    if stream:
        chunks = streamed(live, "/v1/completions", body | {"temperature": 0})
        told = [chunk["choices"][0] for chunk in chunks]
        whole = "".join(choice["text"] for choice in told)
        tokens, offsets = ([x for c in told for x in c["logprobs"][name]] for name in ("tokens", "text_offset"))
    else:
        choice = live.complete(**body)["choices"][0]
        whole, tokens, offsets = choice["text"], choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    length = len(encode(text))
    assert whole.startswith(text) and tokens.count("<|eos|>") >= 3 and len(tokens) == len(offsets) == length + 6
    for token, offset in zip(tokens[:length], offsets, strict=False):
        assert token.startswith("bytes:") or whole[offset:].startswith(token)
    assert offsets[length] == len(text)


def test_scoring_alone(live):
    scored = live.complete("The people", echo=True, logprobs=1, max_tokens=0)
    generated = live.complete("The people", echo=True, logprobs=1, max_tokens=1)
    choice = scored["choices"][0]
    length = len(encode("The people"))
    assert choice["text"] == "The people" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(
        generated["choices"][0]["logprobs"]["token_logprobs"][:length], abs=1e-4, nan_ok=True
    )
    assert scored["usage"]["completion_tokens"] == 0


def test_scoring_tells_the_token_that_ends_the_text(live):
    """lm-eval asks for one token more than it scores, and drops it."""
    fields = {"echo": True, "logprobs": 1, "max_tokens": 1, "logit_bias": {"1": 100}}
    choice = live.complete("The people", **fields)["choices"][0]
    assert choice["text"] == "The people" and choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == len(encode("The people")) + 1
    assert choice["logprobs"]["tokens"][-1] == "<|eos|>"
    ignored = live.complete("The people", **fields, ignore_eos=True)["choices"][0]
    assert ignored["logprobs"] == choice["logprobs"] and ignored["finish_reason"] == "length"


def test_nothing_asked_for_is_nothing(live):
    assert live.complete("The", max_tokens=0)["choices"][0]["text"] == ""


def test_no_top_logprobs_still_tells_the_chosen(live):
    said = live.complete("The", logprobs=0, max_tokens=3, ignore_eos=True)["choices"][0]["logprobs"]
    assert [set(top) for top in said["top_logprobs"]] == [{token} for token in said["tokens"]]
    assert all(math.isfinite(value) for value in said["token_logprobs"])


def test_echo_of_ids_shows_their_text(live):
    ids = encode("yes, we do")
    assert live.complete(ids, echo=True, max_tokens=0)["choices"][0]["text"] == "yes, we do"


def test_routes_tell_the_experts_of_each_token(live):
    body = {"prompt": "The café", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "cadre": {"routes": True}}
    chunks = streamed(live, "/v1/completions", body)
    tokens = [token for chunk in chunks for token in chunk["cadre"]["tokens"]]
    config = parts()[0].config
    assert [token["id"] for token in tokens] == alone(encode("The café"), 12, temperature=0)[1]
    for token in tokens:
        assert len(token["experts"]) == 1  # the second of two layers is sparse
        assert all(len(set(row)) == config.num_experts_per_tok for row in token["experts"])
        assert all(0 <= expert < config.n_routed_experts for row in token["experts"] for expert in row)
    assert "".join(t["text"] for t in tokens) == "".join(c["text"] for chunk in chunks for c in chunk["choices"])
    length = len(encode("The café"))
    assert chunks[-1]["cadre"]["positions"] == length + 12
    assert chunks[0]["cadre"]["cache_bytes_per_token"] == (10 + 4) * 2 * 4  # latent and rotary part, 2 layers, float32
    assert chunks[0]["cadre"]["cache_bytes_per_token_mha"] == 3 * (10 + 5) * 2 * 4


@pytest.mark.parametrize("extra, param, code, says", [
    ({"prompt": "qz" * 4500}, "prompt", "context_length_exceeded", "but the context is 512 tokens"),
    ({"max_tokens": CONTEXT}, "max_tokens", "context_length_exceeded", "512 more are asked for"),
    ({"prompt": [300]}, "prompt", None, "token id 300 is outside the model's vocabulary"),
    ({"prompt": []}, "prompt", None, "prompt"),
    ({"logit_bias": {"300": 1}}, None, None, "token id 300, outside"),
    ({"logit_bias": {"x": 1}}, "logit_bias", None, "logit_bias"),
    ({"n": 73}, "n", None, "at most 72"),
    ({"logprobs": 20, "n": 72, "max_tokens": 500, "prompt": ["a"] * 2}, "n", None, "at most 72"),
    ({"suffix": "end"}, "suffix", "unsupported_parameter", "suffix is not offered"),
    ({"best_of": 2}, "best_of", "unsupported_parameter", "best_of must equal n"),
    ({"frobnicate": 1}, "frobnicate", "unsupported_parameter", "is not a field that this server knows"),
    ({"first": None, "second": 1, "third": 2}, "second", "unsupported_parameter", "second is not a field"),
    ({"logit_bias": {str(n): 1.0 for n in range(1025)}}, "logit_bias", None, "has 1,025 entries; 1,024 are the most"),
    ({"prompt": [[1]] * 129}, "prompt", None, "has 129 entries; 128 are the most"),
    ({"prompt": ["a"] * 129}, "prompt", None, "has 129 entries; 128 are the most"),
    ({"tools": []}, "tools", "unsupported_parameter", "is not a field"),
    ({"stop": [""]}, "stop", None, "at least 1 character"),
    ({"stop": ["x"] * 17}, "stop", None, "at most 16"),
    ({"stream_options": {"include_usage": True}}, None, None, "stream_options need stream: true"),
    ({"cadre": {"routes": True}}, None, None, "cadre.routes needs stream: true"),
    ({"guided_json": {}, "guided_regex": "x"}, None, None, "exclude each other"),
    ({"temperature": "1"}, "temperature", None, "temperature: Input should be a valid number"),
    ({"prompt": "\ud800"}, "prompt", None, "half of a surrogate pair"),
])  # fmt: skip
def test_what_is_refused(live, extra, param, code, says):
    body = {"prompt": "The", "max_tokens": 4} | extra
    if body["prompt"] == "x" * 9000:
        body["prompt"] = "qz" * 4500
    answer = live.post("/v1/completions", None, content=json.dumps(body), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code)
    assert says in error["message"]


@pytest.mark.parametrize("field, value", [
    ("user", "me"), ("suffix", None), ("suffix", ""), ("best_of", 1), ("stop", None), ("metadata", {"a": "b"}),
    ("store", False),
])  # fmt: skip
def test_what_changes_nothing_is_taken(live, field, value):
    assert live.complete(**{field: value})["choices"] == live.complete()["choices"]


def test_the_model_is_called_by_its_name(live):
    assert live.complete(model="tiny")["choices"] == live.complete()["choices"]
    answer = live.post("/v1/completions", {"prompt": "The", "model": "huge"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_more_logprobs_than_memory_is_for_are_refused(monkeypatch, live):
    monkeypatch.setattr("cadre.serve.service._MOST_LOGPROBS", 1000)
    assert live.complete(logprobs=9, max_tokens=99)["choices"]
    for path, body in (
        ("/v1/completions", {"prompt": "The", "logprobs": 9, "max_tokens": 101}),
        ("/v1/completions", {"prompt": "The", "logprobs": 0, "max_tokens": 334, "n": 3}),
        ("/v1/completions", {"prompt": [[5] * 400] * 3, "logprobs": 0, "echo": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 9}),
    ):
        answer = live.post(path, body)
        assert answer.status_code == 400 and "log-probabilities" in answer.json()["error"]["message"]
