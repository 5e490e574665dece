"""Conversations as training text: written by the model's chat template, learned are the assistant's messages."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from cadre.errors import UsageError, shorten
from cadre.hub.directory import model_directory
from cadre.hub.template import CHAT_TEMPLATE, ChatTemplate, Messages, chat_template
from cadre.hub.tokenizer import BOS, EOS, tokenizer_file

# Where in a text what is learned begins and stops, in letters.
Spans = tuple[tuple[int, int], ...]
# A template once it is needed: one that is damaged is no matter to other text. None: there is none.
Template = Callable[[], ChatTemplate | None]

# The same text every day.
_A_DAY = datetime(2025, 1, 1)


def template_of(tokenizer: str | Path | None) -> Template:
    """What writes conversations for a tokenizer: the template that lies beside it; for one that we train (None), our own."""

    @cache
    def template() -> ChatTemplate | None:
        if tokenizer is None:
            return ChatTemplate(CHAT_TEMPLATE, {"bos_token": BOS, "eos_token": EOS})
        return chat_template(tokenizer_file(tokenizer).parent, now=lambda: _A_DAY)

    return template


def template_of_model(model: Path) -> Template:
    """The template of a model or run directory."""
    return cache(lambda: chat_template(model_directory(model), now=lambda: _A_DAY))


def messages_of(value: Any, where: str) -> Messages:
    """What the field `messages` of a record holds, in the form of OpenAI's API: objects with `role` and `content`; of the
    assistant's also a `weight` of "0" where that says that they are not to be learned. Other fields are left out. Raises
    `UsageError` for anything else."""
    if not isinstance(value, list) or not value:
        raise UsageError(f'{where}: "messages" must be a list of objects with role and content')
    messages = []
    for number, message in enumerate(value):
        parts = {name: message.get(name) for name in ("role", "content")} if isinstance(message, dict) else {}
        messages.append({name: part for name, part in parts.items() if isinstance(part, str)})
        if len(messages[-1]) < 2:
            raise UsageError(f'{where}: message {number + 1} of {len(value)} has no "role" and "content" that are strings')
        if message.get("tool_calls"):  # without them the assistant would learn to say nothing
            raise UsageError(f"{where}: message {number + 1} of {len(value)} calls a tool, which is not written: leave it out")
        if messages[-1]["role"] == "assistant" and (weight := message.get("weight")) is not None:
            if isinstance(weight, bool) or weight not in (0, 1):
                said = shorten(repr(weight))
                raise UsageError(
                    f"{where}: message {number + 1} of {len(value)} has weight {said}; it must be 0 or 1, or absent"
                )
            if not weight:
                messages[-1]["weight"] = "0"
    if all(message["role"] != "assistant" for message in messages):
        raise UsageError(f"{where}: no message is the assistant's, so there is nothing to learn")
    if all(message["role"] != "assistant" or "weight" in message for message in messages):
        raise UsageError(f"{where}: all messages of the assistant's have weight 0, so there is nothing to learn")
    return messages


def written(messages: Messages, template: ChatTemplate, where: str) -> tuple[str, Spans]:
    """A conversation as text, and of it the spans that the model would have had to write: what follows the prompt for each of
    the assistant's messages but those of weight "0", with what the template puts after it. Raises `UsageError` for a template
    that refuses the messages, or writes earlier ones otherwise once later ones have come: its prompts would not be those of
    the text."""
    learned = [message["role"] == "assistant" and "weight" not in message for message in messages]
    messages = [{name: part for name, part in message.items() if name != "weight"} for message in messages]
    try:
        text = template.render(messages, to_answer=False)
        spans = []
        for number, is_learned in enumerate(learned):
            if is_learned:
                prompt = template.render(messages[:number])
                answered = template.render(messages[: number + 1], to_answer=False)
                if not (text.startswith(answered) and answered.startswith(prompt) and len(prompt) < len(answered)):
                    raise UsageError(
                        f"the chat template writes message {number + 1} otherwise than as the continuation of its prompt"
                    )
                spans.append((len(prompt), len(answered)))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return text, tuple(spans)
