"""The other addresses, and what all of them have in common."""

import json

import pytest
from tokenizers import Tokenizer, models

from cadre.serve import page
from cadre.serve.replies import CadreFacts
from tests.serve.live import CONTEXT, Live, parts


def test_models(live):
    listed = live.get("/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["owned_by"], model["max_model_len"]) == ("tiny", "model", "cadre", CONTEXT)
    assert model["cadre"] == {
        "chat_template": True, "base_model": True, "context": CONTEXT, "cache_bytes_per_token": 112,
        "cache_bytes_per_token_mha": 360,
        "experts": 6, "top_k": 2, "sparse_layers": [1],
    }  # fmt: skip
    assert set(model["cadre"]) == set(CadreFacts.model_fields)
    assert live.get("/v1/models/tiny").json() == model


@pytest.mark.parametrize("name", ["other", "a/b", "", "%ff"])
def test_another_model(live, name):
    answer = live.get(f"/v1/models/{name}")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_tokenize_and_back(live):
    text = "The naïve café, 你好 😀"
    told = live.post("/tokenize", {"prompt": text}).json()
    assert told == {"tokens": parts()[1].encode(text).ids, "count": len(told["tokens"]), "max_model_len": CONTEXT}
    assert live.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": text}
    assert live.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert live.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_tokenize_messages(live):
    told = live.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()
    assert live.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": "<|user|>hi<|assistant|>"}


def test_tokenize_counts_what_is_longer_than_the_context(live):
    """Whoever shortens a text by its tokens, as the chat page does, has to count them first."""
    text = "The people " * 4000
    wanted = parts()[1].encode(text).ids
    assert live.post("/tokenize", {"prompt": text}).json()["tokens"] == wanted
    told = live.post("/tokenize", {"messages": [{"role": "user", "content": text}]}).json()
    assert told["count"] == len(told["tokens"]) > len(wanted) > CONTEXT


@pytest.mark.parametrize("path, body", [
    ("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
    ("/tokenize", {"prompt": "\ud800"}), ("/detokenize", {"tokens": [300]}), ("/detokenize", {"tokens": [-1]}),
    ("/detokenize", {"tokens": [True]}),
])  # fmt: skip
def test_tokenize_refuses(live, path, body):
    answer = live.post(path, None, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_text_that_the_tokenizer_has_no_tokens_for(monkeypatch):
    model, tokenizer = parts()[0], Tokenizer(models.WordLevel({"yes": 0}))
    monkeypatch.setattr("tests.serve.live.parts", lambda: (model, tokenizer))
    with Live() as server:
        answer = server.post("/tokenize", {"prompt": "no"})
    assert answer.status_code == 400 and "cannot encode the prompt" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/page/style.css", "/health", "/metrics", "/v1/models", "/v1/models/tiny", "/nowhere"])
def test_the_head_of_an_answer_alone(live, path):
    """For probes and link checkers."""
    head, whole = live.client.head(path), live.get(path)
    assert head.status_code == whole.status_code and head.content == b""
    assert head.headers["content-type"] == whole.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == str(len(whole.content))


def test_embeddings_are_not_offered(live):
    answer = live.post("/v1/embeddings", {"input": "x", "model": "tiny"})
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "embeddings are not offered: this server has a model that generates text",
        "type": "invalid_request_error", "param": None, "code": "not_offered",
    }  # fmt: skip


@pytest.mark.parametrize("method, path, status, code", [
    ("GET", "/nowhere", 404, "not_found"), ("GET", "/v1", 404, "not_found"), ("GET", "/v1/models/", 404, "model_not_found"),
    ("POST", "/v1/completions/", 404, "not_found"), ("GET", "/v1/completions", 405, "method_not_allowed"),
    ("OPTIONS", "/v1/completions", 405, "method_not_allowed"), ("DELETE", "/health", 405, "method_not_allowed"),
    ("GET", "/page/../app.py", 404, "not_found"), ("GET", "/page/%2e%2e/app.py", 404, "not_found"),
    ("GET", "/docs", 404, "not_found"), ("HEAD", "/v1/completions", 405, None),
])  # fmt: skip
def test_other_addresses_and_methods(live, method, path, status, code):
    answer = live.client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code if code is not None else not answer.content


@pytest.mark.parametrize("content, kind, says", [
    (b"", "application/json", "there is no body"),
    (b"{", "application/json", "not JSON: Expecting property name"),
    (b"[1]", "application/json", "must be a JSON object"),
    (b"null", "application/json", "must be a JSON object"),
    (b'"text"', "application/json", "must be a JSON object"),
    (b'{"prompt": "a"}', "text/plain", "must be a JSON object, sent as Content-Type: application/json"),
    (b"prompt=a", "application/x-www-form-urlencoded", "must be a JSON object"),
    (b"\xff\xfe\x00", "application/json", "it is not UTF-8"),
    (b"[" * 100_000, "application/json", "nested too deeply"),
    (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "application/json", "a number of thousands of digits"),
    (b'{"prompt": "a", "temperature": NaN}', "application/json", "finite number"),
    (b'{"prompt": "a", "temperature": 1e999}', "application/json", "finite number"),
    (b'{"prompt": "a", "\\ud800": 1}', "application/json", "unicode"),
    (b'{"prompt": "a", "' + b"x" * 5000 + b'": 1}', "application/json", "xxx..."),
])  # fmt: skip
def test_bodies_that_are_no_request(live, content, kind, says):
    answer = live.post("/v1/completions", None, content=content, headers={"content-type": kind})
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert says in error["message"] and len(error["message"]) < 700 and error["type"] == "invalid_request_error"


def test_the_chat_page(live):
    for name, media_type in page.FILES.items():
        answer = live.get("/" if name == "index.html" else f"/page/{name}")
        assert answer.status_code == 200 and answer.content == page.read(name)
        assert answer.headers["content-type"] == media_type
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_no_answer_invites_other_sites(live):
    for path in ("/", "/v1/models", "/health"):
        headers = live.get(path, headers={"origin": live.url}).headers
        assert not [name for name in headers if name.startswith("access-control")]


def test_a_broken_engine_is_told_and_ends_the_server(monkeypatch):
    with Live() as server:
        monkeypatch.setattr(server.engine, "step", lambda: 1 / 0)
        answer = server.post("/v1/completions", {"prompt": "The"})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failed"
        assert answer.headers["x-should-retry"] == "false"
        server.thread.join(20)
        assert not server.thread.is_alive()
        assert isinstance(server.loop.failure, ZeroDivisionError)


def test_a_bug_in_an_endpoint_is_a_500_of_the_usual_shape(monkeypatch, caplog):
    with Live() as server:
        monkeypatch.setattr(server.admission, "check", lambda _: 1 / 0)
        answer = server.get("/health")
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert "ZeroDivisionError" in caplog.text
