"""Holding an answer to a JSON schema or a regular expression: which tokens may come next.

The grammar work is llguidance's (extra `serve`): one wheel without dependencies, which refuses the conditions of a schema that
it cannot hold an answer to, and bounds its own work. Of its rivals, xgrammar 0.2.8 needs triton and transformers and lets such
conditions pass, and outlines-core 0.2.14 ignores the bounds of numbers and takes seconds for an open schema.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator
from decimal import Decimal
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cadre.errors import UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from tokenizers import Tokenizer

    from cadre.infer.sampling import Sampling

# A schema comes from anyone. Within these a grammar takes at most about a second and 100 MB to compile and some ten
# milliseconds a token; beyond them it is refused, or the answer ends with an error. Measured by tests/infer/test_constraint.py.
_LONGEST = 65_536
# Groups and repetitions of one expression: what the library does with a row of them that may all be empty grows with the
# square of their number, and none of its own limits stops it.
_MOST_PARTS = 1_000
# Expressions of a schema that may all be asked of one text: with each more the library takes twice as long.
_MOST_JOINED = 15
# Beside these what joins has nothing to join: a reference or a choice stands alone, and so does one condition of `allOf`.
_SAY_NOTHING = {"title", "description", "default", "examples", "type", "nullable", "$schema", "$id", "$defs", "definitions",
                "$comment"}  # fmt: skip
_JOINING = {"$ref", "anyOf", "oneOf", "allOf"}
# Keys whose objects hold schemas by names, and those whose values are no schemas.
_NAMING, _DATA = {"properties", "$defs", "definitions"}, {"enum", "const", "default", "examples"}
_REFERENCE = re.compile(r'"\$ref": "((?:[^"\\]|\\.)*)"')
_DEFINITION = re.compile(r"#|#/(\$defs|definitions)/[^/%~]+")
_GREATEST_MULTIPLE = 10_000
_LIMITS: dict[str, Any] = dict(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_items_in_row=1_000,
    max_lexer_states=25_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)
# Compiled grammars that are kept.
_KEPT = 32
# What the library says when a limit is reached.
_TOO_MUCH = ("too many", "Too many", "too big", "too large", "fuel exhausted", "Current row has", "precomputation failed")
# Between JSON's parts a blank or one indented line: a model that may write blanks without end sometimes does.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"( |\n[ \t]{0,32})", "lenient": False, "coerce_one_of": False}


class Constraints:
    """Compiles schemas and expressions for one tokenizer, and keeps the latest. Any thread may call it.

    `vocab_size` is the model's, which may exceed the tokenizer's; `end_ids` are the tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, end_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.end_ids = sorted(end_ids)
        self._lock = Lock()
        self._vocabulary: LLTokenizer | None = None
        # A compiled grammar, or why there is none: what is refused once is not worked on again.
        self._compiled: OrderedDict[tuple[str, str], LLMatcher | str] = OrderedDict()

    def start(self, sampling: Sampling) -> Constraint | None:
        """What holds one answer to the json_schema or regex asked for; None if neither is.

        The first use of one takes milliseconds, at worst about a second; a server calls this in another thread and
        gives a request what comes of it.
        Raises `UsageError` for what is not valid, has no answer, or would take too much to hold an answer to.
        """
        for kind, text in (("json_schema", sampling.json_schema), ("regex", sampling.regex)):
            if text is not None:
                return Constraint(self._grammar(kind, text).deep_copy(), self.vocab_size)
        return None

    def _grammar(self, kind: str, text: str) -> LLMatcher:
        with self._lock:
            found = self._compiled.get((kind, text))
            if found is not None:
                self._compiled.move_to_end((kind, text))
        if found is None:
            vocabulary = self._read_vocabulary()
            try:
                found = _compile(vocabulary, kind, text)
            except UsageError as error:
                found = str(error)
            with self._lock:
                self._compiled[kind, text] = found
                while len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        if isinstance(found, str):
            raise UsageError(found)
        return found

    def _read_vocabulary(self) -> LLTokenizer:
        """The tokenizer as llguidance wants it; reading 100,000 words takes seconds, so it waits for the first use."""
        if self.tokenizer is None:
            raise UsageError("this model has no tokenizer: json_schema and regex need one")
        if not self.end_ids:
            raise UsageError("this model has no end-of-text token (eos_token_id): json_schema and regex need one")
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise UsageError("json_schema and regex need the llguidance package: pip install 'cadre-lm[serve]'") from None
        with self._lock:
            if self._vocabulary is None:
                try:
                    self._vocabulary = LLTokenizer(self.tokenizer.to_str(), n_vocab=self.vocab_size, eos_token=self.end_ids)
                except Exception as error:  # the library raises what its parts raise
                    raise UsageError(f"json_schema and regex cannot use this tokenizer: {_one_line(str(error))}") from error
            return self._vocabulary


class Constraint:
    """How far one answer has come within its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [W]; one that ends the text only where the grammar may stop.

        All of them once there is an `error`.
        """
        if not self._matcher.is_error():
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            return np.ones(self._vocab_size, dtype=bool)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(bool)

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        self._matcher.consume_token(token)

    @property
    def is_finished(self) -> bool:
        """Whether nothing can follow but the end of the text."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the answer cannot go on within its grammar, one line: a token that was not allowed, or too much work."""
        return _reason(self._matcher.get_error()) if self._matcher.is_error() else None


def _compile(vocabulary: LLTokenizer, kind: str, text: str) -> LLMatcher:
    """Raises `UsageError`."""
    from llguidance import LLMatcher, LLParserLimits

    if len(text) > _LONGEST:
        raise UsageError(f"{kind} has {len(text):,} characters; it may have up to {_LONGEST:,}")
    schema = _read_schema(text) if kind == "json_schema" else None
    if kind == "regex":
        _check_parts(kind, text)
    try:
        if kind == "json_schema":
            # Written anew, since the library pastes the text into a larger one.
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)
        else:
            grammar = LLMatcher.grammar_from_regex(text)
    except UnicodeEncodeError:
        raise UsageError(f"{kind} is not valid Unicode text") from None
    except ValueError as error:
        raise UsageError(f"{kind} cannot be used: {_reason(str(error))}") from None
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
    if not matcher.is_error():
        matcher.compute_bitmask()  # what takes too much work is mostly found at the first token
    if matcher.is_error():
        raise UsageError(f"{kind} cannot be used: {_reason(matcher.get_error())}")
    if kind == "json_schema" and matcher.is_accepting():
        raise UsageError("json_schema cannot be used: it refers to itself without end")
    return matcher


def _read_schema(text: str) -> Any:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except ValueError as error:
        raise UsageError(f"json_schema is not valid JSON: {_one_line(str(error))}") from None
    except RecursionError:
        raise UsageError("json_schema is nested too deeply") from None
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise UsageError("json_schema must be a JSON object")
    schema.pop("x-guidance", None)  # the library's own options, which could ask for text that is no JSON
    # The library bounds the work of most else. Conditions on one number combine to their common multiple, expressions of one
    # text to all that they can have matched together.
    multiple = 1
    expressions: set[str] = set()
    joined = False
    for part in _schemas_in(schema):
        value = part.get("multipleOf")
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            multiple = math.lcm(multiple, _digits(value))
        names = part.get("patternProperties")
        for name in names if isinstance(names, dict) else ():
            _check_parts("json_schema", name)
        for expression in (part.get("pattern"), part.get("format")):
            if isinstance(expression, str):
                _check_parts("json_schema", expression)
                expressions.add(expression)
        told, all_of = part.keys() - _SAY_NOTHING, part.get("allOf")
        several = isinstance(all_of, list) and len(all_of) > 1
        joined = joined or several or (len(told) > 1 and not told.isdisjoint(_JOINING))
    if joined and len(expressions) > _MOST_JOINED:
        raise UsageError(
            f"json_schema cannot be used: it has {len(expressions):,} expressions (pattern, format) and ways to ask"
            f" several of one text (such as allOf); {_MOST_JOINED} are the most then"
        )
    if multiple > _GREATEST_MULTIPLE:
        raise UsageError(
            f"json_schema cannot be used: its values of multipleOf have no common multiple up to {_GREATEST_MULTIPLE:,}"
        )
    return schema


def _schemas_in(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every schema within a schema. Where a reference names another place than a definition, everything may be one."""
    usual = all(_DEFINITION.fullmatch(reference) for reference in _REFERENCE.findall(json.dumps(schema)))
    parts: list[Any] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            yield part
            for key, value in part.items():
                if usual and key in _NAMING and isinstance(value, dict):
                    parts += value.values()
                elif not usual or key not in _DATA:
                    parts.append(value)


def _check_parts(kind: str, expression: str) -> None:
    parts = sum(map(expression.count, "(*?{"))
    if parts > _MOST_PARTS:
        raise UsageError(
            f"{kind} cannot be used: an expression with {parts:,} groups and repetitions is too complex;"
            f" {_MOST_PARTS:,} are the most"
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{_one_line(text)} is too large a number")
    return value


def _digits(value: float) -> int:
    """The number without its decimal point."""
    number = Decimal(str(value)).normalize()
    return int(number.scaleb(-min(0, int(number.as_tuple().exponent))))


def _reason(error: str) -> str:
    """What is wrong, without the library's own state and advice."""
    lines = error.splitlines() or [""]
    # A regex parser draws its error over several lines.
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    if "NoExtension" in told:
        return "there is no text that the tokenizer can write and that matches it"
    if any(sign in told for sign in _TOO_MUCH):
        return "it is too complex"
    told = told.partition("(in regex): ")[2] or told
    return _one_line(told.partition("; ")[0])


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:200] + " …"
