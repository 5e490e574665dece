"""`cadre chat`: talk to a model, line by line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from cadre.cli.models import load_with_tokenizer
from cadre.cli.options import MaxTokens, Model, Quantize, Seed, Temperature, TopK, TopP
from cadre.cli.progress import from_standard_input, shown
from cadre.errors import Terminated, UsageError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from cadre.infer.chat import Conversation


def chat(
    model: Model,
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    seed: Seed = None,
    quantize: Quantize = None,
) -> None:
    """Talk to a model: by its chat template; one that never saw conversations continues a transcript."""
    from rich.console import Console

    from cadre.hub.directory import model_directory
    from cadre.hub.template import chat_template
    from cadre.infer.chat import Conversation
    from cadre.infer.sampling import Sampling

    sampling = Sampling(temperature, top_p, top_k)
    loaded, tokenizer = load_with_tokenizer(model, quantize)
    template = chat_template(model_directory(model))
    render = None if template is None or template.untrained else template.render
    conversation = Conversation(loaded, tokenizer, sampling, max_tokens, seed, render)
    # Prompts are for people: with lines from a pipe, standard output holds the answers only.
    if sys.stdin is None:
        return
    console = Console(highlight=False) if sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty() else None
    if console:
        console.print("/reset forgets what was said, /quit or Ctrl-D leaves, Ctrl-C stops an answer.", style="dim")
    while True:
        try:
            line = _read(console)
        except Terminated:
            raise
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            conversation.reset()
        elif line.strip():
            try:
                _answer(conversation, line)
            except UsageError as error:
                if not console:
                    raise
                console.print(printable(str(error)), style="red", markup=False)


def _read(console: Console | None) -> str:
    """One line without its end. Raises `EOFError` after the last."""
    if console:
        return console.input("[bold cyan]>[/] ")
    line = from_standard_input(sys.stdin.readline)
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _answer(conversation: Conversation, line: str) -> None:
    pieces = conversation.reply(line)
    try:
        for piece in pieces:
            typer.echo(shown(piece), nl=False)
    except Terminated:
        raise
    except KeyboardInterrupt:
        pass
    typer.echo()
