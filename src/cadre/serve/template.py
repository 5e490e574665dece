"""From chat messages to the one text a model continues: the model's own chat template, or a transcript."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from cadre.errors import UsageError

Messages = Sequence[dict[str, str]]


class ChatTemplate:
    """A Hugging Face chat template (Jinja), run in a sandbox: it comes with the model, not with Cadre.

    Raises `UsageError` for a template that does not parse.
    """

    def __init__(self, source: str, special: dict[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # As transformers sets up its own (utils/chat_template_utils.py): templates rely on it.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source, self.special = source, special
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise UsageError(f"the model's chat template does not parse: {error}") from None

    def render(self, messages: Messages) -> str:
        """The prompt for the assistant's next message. Raises `UsageError` for messages the template refuses."""
        try:
            return self.template.render(messages=messages, add_generation_prompt=True, **self.special)
        except Exception as error:  # a template is a program: anything can go wrong in it
            raise UsageError(f"the model's chat template refuses these messages: {error}") from None


def chat_template(source: str | None, config: dict[str, Any]) -> ChatTemplate | None:
    """Of what `hub.tokenizer.template_source` has read: the template and the content of `tokenizer_config.json`."""
    return None if source is None else ChatTemplate(source, _special(config))


def transcript(messages: Messages) -> str:
    """A line for each message, as `cadre chat` writes it for models without a template: the next line is the answer."""
    return "".join(message["content"] + "\n" for message in messages)


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
