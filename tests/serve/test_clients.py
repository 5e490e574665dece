"""The programs people already have: the `openai` package and curl."""

import asyncio
import json
import subprocess
import time

import openai
import pytest

from tests.serve.live import Live
from tests.serve.test_completions import alone, encode

HI = [{"role": "user", "content": "hi"}]
KEY = "sk-test"


@pytest.fixture(scope="module")
def server():
    with Live(api_key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "cadre"


def test_a_completion(client):
    answer = client.completions.create(
        model="tiny", prompt="The people", max_tokens=20, seed=4, temperature=0.9, extra_body={"top_k": 5}
    )
    assert answer.choices[0].text == alone(encode("The people"), 20, seed=4, temperature=0.9, top_k=5)[0]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_completion(client):
    fields = {"model": "tiny", "prompt": "The", "max_tokens": 20, "temperature": 0}
    stream = client.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == client.completions.create(**fields).choices[0].text
    assert chunks[-1].usage.completion_tokens == 20


def test_chat(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HI, n=2, max_completion_tokens=9, temperature=1, seed=3, logprobs=True, top_logprobs=2
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def test_streamed_chat_by_the_clients_own_accumulator(client):
    fields = {"model": "tiny", "messages": HI, "max_tokens": 25, "temperature": 0}
    with client.chat.completions.stream(**fields) as stream:
        for _ in stream:
            pass
        whole = stream.current_completion_snapshot
    assert whole.choices[0].message.content == client.chat.completions.create(**fields).choices[0].message.content


def test_many_at_once_asynchronously(server, client):
    async def ask(client, seed):
        stream = await client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=30, temperature=1, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def everyone():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(12)))

    for seed, text in enumerate(asyncio.run(everyone())):
        answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=30, temperature=1, seed=seed)
        assert text == answer.choices[0].message.content


def test_a_stream_that_is_closed_early_is_cancelled(server, client):
    generated = server.engine.stats.generated_tokens
    stream = client.completions.create(model="tiny", prompt="The", max_tokens=500, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    server.until(server.idle, 5)
    assert server.engine.stats.generated_tokens - generated < 500


def test_tools_are_refused_clearly(client):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError, match="tools is not offered: models here are not trained to") as caught:
        client.chat.completions.create(model="tiny", messages=HI, tools=[tool])
    assert caught.value.param == "tools" and caught.value.code == "unsupported_parameter"


def test_each_error_is_of_the_clients_own_kind(server, client):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError, match="'huge' is not here"):
        client.completions.create(model="huge", prompt="x")
    with pytest.raises(openai.NotFoundError, match="embeddings are not offered"):
        client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.NotFoundError, match="the Responses API is not offered: use /v1/chat/completions"):
        client.responses.create(model="tiny", input="x")
    with pytest.raises(openai.BadRequestError, match="the context is 512 tokens") as caught:
        client.completions.create(model="tiny", prompt="x", max_tokens=9999)
    assert caught.value.code == "context_length_exceeded"


def test_an_error_in_the_middle_of_a_stream_is_raised(monkeypatch):
    with Live(timeout=0.2) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        with server.held():
            stream = client.completions.create(model="tiny", prompt="The", max_tokens=400, stream=True)
            server.until(lambda: server.loop.live)
            time.sleep(0.3)
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(stream)


def test_the_client_comes_back_when_the_queue_is_full():
    """429 with Retry-After is what its own retries wait for."""
    small = Live(max_batch=1, max_queue=0)
    with small, openai.OpenAI(base_url=small.url + "/v1", api_key="x", max_retries=5) as client:
        fields = {"model": "tiny", "prompt": "The", "max_tokens": 40}

        async def both():
            return await asyncio.gather(*(asyncio.to_thread(client.completions.create, **fields) for _ in range(2)))

        assert all(answer.choices for answer in asyncio.run(both()))


def curl(*arguments):
    done = subprocess.run(["curl", "-sS", "--max-time", "30", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl(server):
    body = json.dumps({"prompt": "The", "max_tokens": 12, "temperature": 0})
    headers = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    answer = json.loads(curl(*headers, server.url + "/v1/completions", "-d", body))
    assert answer["choices"][0]["text"] == alone(encode("The"), 12, temperature=0)[0]
    streamed = curl("-N", *headers, server.url + "/v1/completions", "-d", body[:-1] + ', "stream": true}')
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer["choices"][0]["text"]
    assert streamed.endswith("data: [DONE]\n\n")
    assert curl("-o", "/dev/null", "-w", "%{http_code}", server.url + "/v1/models") == "401"
    assert curl("-w", "%{http_code}", server.url + "/health") == '{"status":"ok"}200'
    # curl asks before it sends a large body.
    large = json.dumps({"prompt": "The", "max_tokens": 1, "metadata": {"x": "y" * 900_000}})
    done = subprocess.run(
        ["curl", "-sS", *headers, "-H", "Expect: 100-continue", server.url + "/v1/completions", "-d", "@-"],
        input=large, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 1
