"""What clients may ask: OpenAI's field names, vLLM's where OpenAI has none, each with its limits.

A field that would change the output but is not offered is refused, by name, unless it holds the value that changes
nothing; one that cannot change the output (`user`, `metadata`) is taken and ignored; an unknown one is refused unless it is
null.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from cadre.serve.errors import unsupported

MAX_BODY_BYTES = 1 << 20  # more would hold up everybody else while it is read
MAX_CHOICES = 128  # prompts times n
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_GRAMMAR = 64 << 10  # characters of a JSON schema or a regular expression
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_MESSAGES = 4096


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not Unicode text") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), AfterValidator(_unicode)]
Grammar = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR), AfterValidator(_unicode)]


def _few(values: Any) -> Any:
    """Pydantic would look at each of them first, while everybody waits."""
    if isinstance(values, dict) and len(values) > MAX_BIASES:
        raise ValueError(f"has {len(values):,} entries; {MAX_BIASES:,} are the most")
    return values


def _few_prompts(values: Any) -> Any:
    if isinstance(values, list) and len(values) > MAX_CHOICES and not isinstance(values[0], int):
        raise ValueError(f"has {len(values):,} entries; {MAX_CHOICES} are the most")
    return values


class _Fields(BaseModel):
    # Strict: "0.5" is no number and true no 1, as in the published schema.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _one_stranger(cls, values: Any) -> Any:
        """Of fields that nobody knows those that are null say nothing, and one other is enough to be refused: pydantic would
        complain about each."""
        if not isinstance(values, dict):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        strangers = [name for name, value in values.items() if name not in known and value is not None]
        return {name: value for name, value in values.items() if name in known or name in strangers[:1]}


class StreamOptions(_Fields):
    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description="ignored: chunks are never padded")


class JsonSchema(_Fields):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="ignored: the output always follows the schema")


class ResponseFormat(_Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, and only to it")
        return self


class CadreOptions(_Fields):
    routes: bool = Field(False, description="each streamed chunk tells which experts its tokens met; needs stream")


class Generation(_Fields):
    """What completions and chat completions share."""

    # Values of fields that are not offered which change nothing, so that clients that always send them work.
    IDLE: ClassVar[dict[str, tuple[Any, ...]]] = {}
    REASON: ClassVar[dict[str, str]] = {}

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=1 << 31, description="0 or -1: no limit")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None,
        Field(max_length=MAX_BIASES),
        BeforeValidator(_few),
    ] = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: Grammar | dict[str, Any] | None = None
    guided_regex: Grammar | None = None
    cadre: CadreOptions | None = None
    # Ignored: they change nothing about the output.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, values: Any) -> Any:
        """Drop fields that are not offered where they ask for nothing, refuse them where they ask for something."""
        if not isinstance(values, dict):
            return values
        for name, idle in cls.IDLE.items():
            if name in values and values[name] is not None and values[name] not in idle:
                raise unsupported(f"{name} is not offered: {cls.REASON.get(name, 'this server generates text only')}", name)
        return {name: value for name, value in values.items() if name not in cls.IDLE}

    @model_validator(mode="after")
    def _one_grammar(self) -> Generation:
        formatted = self.response_format is not None and self.response_format.type != "text"
        if sum((formatted, self.guided_json is not None, self.guided_regex is not None)) > 1:
            raise ValueError("response_format, guided_json and guided_regex exclude each other: give one")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream: true")
        if self.cadre is not None and self.cadre.routes and not self.stream:
            raise ValueError("cadre.routes needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def grammar(self) -> tuple[str | None, str | None]:
        """(JSON schema, regular expression) that the output must follow, as text; one of them at most."""
        if self.guided_regex is not None:
            return None, self.guided_regex
        if self.guided_json is not None:
            return (self.guided_json if isinstance(self.guided_json, str) else json.dumps(self.guided_json)), None
        if self.response_format is None or self.response_format.type == "text":
            return None, None
        if self.response_format.json_schema is None:
            return '{"type": "object"}', None
        return json.dumps(self.response_format.json_schema.schema_), None


class CompletionRequest(Generation):
    IDLE = {"suffix": ("",)}
    REASON = {"suffix": "models here continue a text, they do not fill gaps in one"}

    prompt: Annotated[
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)],
        BeforeValidator(_few_prompts),
    ] = Field(description="one text, its token ids, or a list of either")
    max_tokens: int | None = Field(None, ge=0, lt=1 << 31, description="16 if absent")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="only as many as n: nothing is ranked")

    @field_validator("best_of")
    @classmethod
    def _nothing_ranked(cls, best_of: int | None, info: Any) -> int | None:
        if best_of is not None and best_of != (info.data.get("n") or 1):
            raise unsupported("best_of must equal n: this server returns every choice it generates", "best_of")
        return best_of


class TextPart(_Fields):
    type: Literal["text"]
    text: Text


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("role") in ("tool", "function") or any(values.get(name) for name in ("tool_calls", "function_call")):
            raise unsupported("tools are not offered: messages of tools and tool calls have no meaning here", "messages")
        parts = values.get("content")
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
                raise unsupported(f"content of type {part['type'][:40]} is not offered: models here read text only", "messages")
        idle = ("tool_calls", "function_call", "refusal", "audio", "annotations")
        return {name: value for name, value in values.items() if name not in idle or value not in (None, [])}

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


_TOOLS = "models here are not trained to call tools"


class ChatRequest(Generation):
    IDLE = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "prediction": (),
    }
    REASON = dict.fromkeys(("tools", "tool_choice", "functions", "function_call"), _TOOLS)

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31, description="as many as the context holds if absent")
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _logprobs_asked(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs need logprobs: true")
        return self


class TokenizeRequest(_Fields):
    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self


class DetokenizeRequest(_Fields):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True)]
