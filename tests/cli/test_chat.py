import io
import json
import signal

import pytest
import typer
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

import cadre
from cadre.cli.chat import chat
from cadre.errors import Terminated, UsageError
from cadre.hub.template import CHAT_TEMPLATE, CONVERSED_TEMPLATE, ChatTemplate
from cadre.infer.chat import Conversation
from cadre.infer.quantize import quantize_model
from cadre.infer.sampling import Sampling

APP = typer.Typer()
APP.command()(chat)


def run(model_dir, text, *options):
    return CliRunner().invoke(APP, [str(model_dir), "--seed", "5", "--max-tokens", "8", *options], input=text)


def answers(model_dir, *turns, kind=None):
    """What the library says, turn by turn; None resets."""
    model, tokenizer = cadre.load(model_dir)
    if kind is not None:
        quantize_model(model, kind)
    talk = Conversation(model, tokenizer, Sampling(0.8, 0.95), 8, seed=5)
    said = ""
    for turn in turns:
        if turn is None:
            talk.reset()
        else:
            said += "".join(talk.reply(turn)) + "\n"
    return said


def test_lines_from_a_pipe_are_answered_line_by_line(model_dir):
    result = run(model_dir, "Who are you?\n\nAnd then?\r\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == answers(model_dir, "Who are you?", "And then?")


def test_a_model_may_be_rounded(model_dir):
    result = run(model_dir, "Who are you?\n", "--quantize", "int4")
    assert result.stdout == answers(model_dir, "Who are you?", kind="int4") != answers(model_dir, "Who are you?")


def test_reset_and_quit(model_dir):
    result = run(model_dir, "yes\n/reset\nyes\n /quit \nyes\n")
    assert result.stdout == answers(model_dir, "yes", None, "yes")
    assert run(model_dir, "/quit\n").stdout == ""


def test_ctrl_c_stops_the_answer_not_the_conversation(model_dir, monkeypatch):
    spoken = iter([["half ", KeyboardInterrupt], ["whole"]])

    def reply(self, line):
        for piece in next(spoken):
            if piece is KeyboardInterrupt:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Conversation, "reply", reply)
    assert run(model_dir, "one\ntwo\n").stdout == "half \nwhole\n"


def test_standard_output_may_be_closed(model_dir, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    chat(model_dir, max_tokens=2)


def test_a_line_that_the_tokenizer_has_no_tokens_for(model_dir, tmp_path):
    model, _ = cadre.load(model_dir)
    cadre.save(model, tmp_path / "m", Tokenizer(models.WordLevel({"yes": 0})))
    refused = run(tmp_path / "m", "no\n").exception
    assert isinstance(refused, UsageError) and str(refused).startswith("the tokenizer cannot encode the prompt (WordLevel ")


def test_sigterm_ends_the_conversation(model_dir, monkeypatch):
    def reply(self, line):
        yield "half "
        raise Terminated(signal.SIGTERM)

    monkeypatch.setattr(Conversation, "reply", reply)
    result = run(model_dir, "one\ntwo\n")
    assert result.stdout == "half " and result.exit_code == 130  # what Typer makes of it; `cadre` itself tells them apart


@pytest.mark.parametrize(
    ("text", "message"),
    [("the union " * 60 + "\n", "/reset starts anew"), (b"caf\xe9\n", "not UTF-8")],
)
def test_bad_lines_from_a_pipe_are_usage_errors(model_dir, text, message):
    result = run(model_dir, text)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CONVERSED_TEMPLATE])
def test_a_model_that_has_seen_conversations_is_spoken_to_by_its_template(model_dir, tmp_path, template):
    model, tokenizer = cadre.load(model_dir)
    cadre.save(model, tmp_path / "m", tokenizer)
    file = tmp_path / "m" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    render = ChatTemplate(template, {"eos_token": "<|eos|>"}).render if template == CONVERSED_TEMPLATE else None
    talk = Conversation(model, tokenizer, Sampling(0.8, 0.95), 8, 5, render)
    said = ["".join(talk.reply(line)) for line in ("yes", "And then?")]
    assert run(tmp_path / "m", "yes\nAnd then?\n").stdout == "".join(f"{line}\n" for line in said)
