"""`cadre serve` as a process: its start, its signals, its end."""

import contextlib
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest

import cadre
from cadre.cli.main import main
from cadre.cli.serve import parse_size
from cadre.errors import UsageError
from cadre.serve.server import listen
from tests.shapes import small


@contextlib.contextmanager
def serving(model_dir, *arguments, **environment):
    """The process, its address once it listens, and what it has said until then."""
    command = [sys.executable, "-m", "cadre.cli.main", "serve", str(model_dir), "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    said, found = [], None
    try:
        while not found:
            line = process.stderr.readline()
            assert line, said
            if not line.startswith("compiling the C++ kernels"):
                said.append(line)
            found = re.search(r"http://\S+?:\d+", line)
        yield process, found[0], said
    finally:
        process.kill()
        process.communicate()


def ask(url, **fields):
    return httpx.post(url + "/v1/completions", json={"prompt": "The", "max_tokens": 9, "temperature": 0} | fields, timeout=60)


def test_serves_finishes_what_runs_and_ends_well(model_dir):
    with serving(model_dir, "--max-batch", "2", "--cache", "4MiB") as (process, url, said):
        assert said == [f"m at {url}/v1 (OpenAI's API), {url}/ (chat page)\n"]
        model, tokenizer = cadre.load(model_dir)
        wanted = cadre.generate(model, tokenizer, "The", max_new_tokens=9, temperature=0)
        assert ask(url).json()["choices"][0]["text"] == wanted
        assert httpx.get(url).text.startswith("<!doctype html>")
        with httpx.stream("POST", url + "/v1/completions", json={"prompt": "The", "max_tokens": 60, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_killed_in_the_middle_and_started_again(model_dir):
    with listen("127.0.0.1", 0) as free:
        port = str(free.getsockname()[1])
    with serving(model_dir, "--port", port) as (process, url, _):
        before = ask(url).json()["choices"]
        endless = {"prompt": "The", "n": 32, "max_tokens": 60, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=endless) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.kill()
            with pytest.raises(httpx.TransportError):
                list(lines)
    with serving(model_dir, "--port", port) as (_, url, _):
        assert ask(url).json()["choices"] == before


def test_key_names_and_an_interrupt(model_dir):
    options = ["--model-name", "mine", "--allow-host", "good.example", "--host", "127.0.0.2"]  # this machine's own, too
    with serving(model_dir, *options, CADRE_API_KEY="sk-1") as (process, url, said):
        assert said[-1].startswith("mine at ") and "sk-1" not in said[-1]
        assert httpx.get(url + "/v1/models").status_code == 401
        models = httpx.get(url + "/v1/models", headers={"authorization": "Bearer sk-1"}).json()
        assert [model["id"] for model in models["data"]] == ["mine"]
        assert httpx.get(url + "/health", headers={"host": "evil.example"}).status_code == 403
        assert httpx.get(url + "/health", headers={"host": "good.example"}).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_open_to_all_without_a_key_is_said_and_so_is_what_is_missing(model_dir):
    with serving(model_dir, "--host", "0.0.0.0", CADRE_NATIVE="off") as (process, url, said):
        assert said[0] == "C++ kernels are missing, all is slower: switched off by CADRE_NATIVE\n"
        assert "no --api-key: whoever reaches this address can use the model" in process.stderr.readline()
        local = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(local + "/health", headers={"host": "box.example"}).status_code == 200


def refused(monkeypatch, capsys, *arguments):
    """The one line with which the command refuses."""
    monkeypatch.setattr(sys, "argv", ["cadre", "serve", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def test_bad_usage(monkeypatch, capsys, model_dir, tmp_path):
    assert "is no model directory" in refused(monkeypatch, capsys, tmp_path)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: another program listens" in refused(monkeypatch, capsys, model_dir, "--port", port)
    for arguments, says in [
        (["--port", 70000], "--port"),
        (["--host", "no such host"], "no such host or address"),
        (["--host", "a..b"], "is no name of a host"),
        (["--cache", "9" * 400], "more than any machine has"),
        (["--cache", "99999999TiB"], "more than any machine has"),
        (["--max-batch", 0], "--max-batch"),
        (["--cache", "much"], "--cache is 'much'; it must be a size such as 2GiB"),
        (["--cache", "1"], "cache"),
        (["--api-key", ""], "--api-key: a key consists of"),
        (["--api-key", "two words"], "--api-key: a key consists of"),
    ]:
        assert says in refused(monkeypatch, capsys, model_dir, *arguments)


def test_a_model_without_a_tokenizer(monkeypatch, capsys, tmp_path):
    from cadre.model.transformer import Transformer

    cadre.save(Transformer(small("llama")).initialize(0), tmp_path / "m")
    assert "has no tokenizer.json" in refused(monkeypatch, capsys, tmp_path / "m", "--port", 0)


@pytest.mark.parametrize("text, size", [
    ("1", 1), ("2GiB", 2 << 30), ("2 gib", 2 << 30), ("500MB", 500_000_000), ("1.5KiB", 1536), ("3b", 3), ("1tb", 10**12),
])  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "0.1", "1 G", "1e9", "2 GiB 3", "nan"])
def test_no_sizes(text):
    with pytest.raises(UsageError, match="--cache is"):
        parse_size(text)
