"""Chat templates: from a conversation to the one text that a model reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cadre.errors import UsageError
from cadre.files import kind_of, read_json_object

Messages = Sequence[dict[str, str]]

# Beside every model whose tokenizer we have trained, so that other engines can serve it. Training text separates documents by
# eos and has no bos in it, so neither has a conversation.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Beside those of them that were trained on conversations. It writes the same.
_CONVERSED = "{# of a model that was trained on conversations #}"
CONVERSED_TEMPLATE = _CONVERSED + CHAT_TEMPLATE


class ChatTemplate:
    """A Hugging Face chat template (Jinja), run in a sandbox: it comes with the model, not with Cadre. `now`: the time, which
    some templates tell the model.

    Raises `UsageError` for a template that does not parse.
    """

    def __init__(self, source: str, special: dict[str, str], now: Callable[[], datetime] = datetime.now) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # As transformers sets up its own (utils/chat_template_utils.py): templates rely on it.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        self.source, self.special = source, special
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise UsageError(f"the model's chat template does not parse: {error}") from None

    @property
    def untrained(self) -> bool:
        """Whether it stands beside a model only because every model that we train has it."""
        return self.source == CHAT_TEMPLATE

    def writes_as(self, other: ChatTemplate) -> bool:
        """Whether the other is the same template, of a model that was trained on conversations or not."""
        return self.source.removeprefix(_CONVERSED) == other.source.removeprefix(_CONVERSED)

    def render(self, messages: Messages, *, to_answer: bool = True) -> str:
        """The conversation as text, up to where the assistant's next message begins if one is wanted. Raises `UsageError` for
        messages the template refuses."""
        try:
            # As in transformers there are no tools and no documents: left undefined, they would not be none.
            absent = {"tools": None, "documents": None}
            return self.template.render(messages=messages, add_generation_prompt=to_answer, **absent, **self.special)
        except Exception as error:  # a template is a program: anything can go wrong in it
            raise UsageError(f"the model's chat template refuses these messages: {error}") from None


def chat_template(directory: Path, now: Callable[[], datetime] = datetime.now) -> ChatTemplate | None:
    """The chat template of a model directory. Raises `UsageError` for files that cannot be read or do not parse."""
    source, values = template_source(directory)
    if source is None:
        return None
    older = directory / "special_tokens_map.json"
    if "added_tokens_decoder" not in values and kind_of(older) == "file":  # then transformers heeds it first
        values |= read_json_object(older)
    return ChatTemplate(source, _special(values), now)


def template_source(directory: Path) -> tuple[str | None, dict[str, Any]]:
    """The chat template of a model directory, None if it has none, and what its `tokenizer_config.json` holds: the template is
    in `chat_template.jinja` or there (the one named `default` if there are several). Raises `UsageError` for files that cannot
    be read."""
    config, own = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    values = {} if kind_of(config) is None else read_json_object(config)
    source = values.get("chat_template")
    if kind_of(own) == "file":
        try:
            source = own.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"{own}: the chat template cannot be read ({error})") from None
    if isinstance(source, list):
        named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = named[-1].get("template") if named else None
    return source if isinstance(source, str) and source else None, values


def _special(values: dict[str, Any]) -> dict[str, str]:
    """The special tokens that templates name, such as bos_token; older files hold objects instead of strings."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = values.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _generation_tag() -> Any:
    """`{% generation %}...{% endgeneration %}` marks what an assistant says, for training; here it is its content."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
