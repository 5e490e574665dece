import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from cadre.errors import UsageError
from cadre.infer import constraint as module
from cadre.infer.constraint import Constraints
from cadre.infer.sampling import Sampler, Sampling

EOS = 1
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b c", 3, None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": "number"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS = [
    True,
    {"type": "object"},
    PERSON,
    TREE,
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    {"type": "string", "format": "date-time"},
    {"type": "number", "minimum": -3.5, "exclusiveMaximum": 10},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    {"anyOf": [{"type": "boolean"}, {"const": {"a": [1, None, "é"]}}, {"type": "string", "maxLength": 3}]},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 1},
    {"type": "object", "patternProperties": {"^x_": {"type": ["null", "integer"]}}, "additionalProperties": False},
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "title": "two",
        "default": {},
    },
]
REGEXES = [
    r"abc",
    r"(yes|no|perhaps)",
    r"[a-z]{3,8}[0-9]+",
    r"([a-zäé]+ ){2,4}[^a-z]\.",
    r"你好+😀?",
    r"",
    r"a/b(\n|/)\"c\"",
    r"^[^x]{5}$",
    r"(?i)naïve",
]


@pytest.fixture(scope="module")
def constraints(tokenizer):
    return Constraints(tokenizer, 300, [EOS])


def write(tokenizer, sampler, seed, most=600, words=300):
    """Text from random logits, in which closing is likelier so that open-ended answers come to an end."""
    numbers = torch.Generator().manual_seed(seed)
    close = torch.zeros(words)
    close[EOS] = 4
    for sign in '"}],.':
        close[tokenizer.token_to_id(sign)] = 4
    ids = []
    for _ in range(most):
        token = sampler.choose(torch.randn(words, generator=numbers) * 2 + close).id
        assert sampler.error is None
        if token == EOS:
            break
        ids.append(token)
        sampler.accept(token)
        if sampler.is_finished:
            break
    else:
        pytest.fail(f"no end: {tokenizer.decode(ids)}")
    return tokenizer.decode(ids)


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_any_logits_give_json_that_is_valid(tokenizer, constraints, schema):
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    sampling = Sampling(json_schema=json.dumps(schema), seed=0)
    for seed in range(8):
        answer = write(tokenizer, Sampler(sampling, (), constraints.start(sampling)), seed)
        checker.validate(json.loads(answer))


scalars = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(["integer", "number", "boolean", "null"])}),
    st.fixed_dictionaries({"type": st.just("string"), "maxLength": st.integers(0, 9)}),
    st.lists(st.one_of(st.integers(), st.text(max_size=5), st.booleans()), min_size=1, max_size=4).map(lambda v: {"enum": v}),
    st.tuples(st.integers(-500, 500), st.integers(0, 900)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": sum(pair)}
    ),
)
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2)).map(
            lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": 3}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        st.tuples(st.dictionaries(st.text(max_size=6), inner, max_size=4), st.integers(0, 4)).map(
            lambda pair: {
                "type": "object",
                "properties": pair[0],
                "required": list(pair[0])[: pair[1]],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=6,
)


@given(schema=schemas, seed=st.integers(0, 2**32))
def test_any_schema_and_logits_give_json_that_is_valid(tokenizer, constraints, schema, seed):
    sampling = Sampling(json_schema=json.dumps(schema), seed=seed, temperature=1.5, top_p=0.95)
    answer = write(tokenizer, Sampler(sampling, (), constraints.start(sampling)), seed)
    jsonschema.Draft202012Validator(schema).validate(json.loads(answer))


@pytest.mark.parametrize("regex", REGEXES)
def test_any_logits_give_a_full_match(tokenizer, constraints, regex):
    sampling = Sampling(regex=regex, seed=0)
    texts = [write(tokenizer, Sampler(sampling, (), constraints.start(sampling)), seed) for seed in range(12)]
    assert all(re.fullmatch(regex, text) for text in texts)
    assert len(set(texts)) > 1 or len(regex) < 4


def allowed(constraint):
    return set(np.flatnonzero(constraint.mask()).tolist())


def test_the_text_may_end_only_where_the_grammar_may_stop(tokenizer, constraints):
    constraint = constraints.start(Sampling(regex="ab{0,2}c"))
    a, b, c = (tokenizer.token_to_id(letter) for letter in "abc")
    assert (allowed(constraint), constraint.is_finished) == ({a}, False)
    constraint.accept(a)
    assert allowed(constraint) == {b, c}
    assert constraint.mask().shape == (300,)
    constraint.accept(b)
    constraint.accept(b)
    assert allowed(constraint) == {c}
    constraint.accept(c)
    assert (allowed(constraint), constraint.is_finished, constraint.error) == ({EOS}, True, None)
    open_ended = constraints.start(Sampling(regex="a+"))
    open_ended.accept(a)
    assert EOS in allowed(open_ended)
    assert not open_ended.is_finished
    open_ended.accept(EOS)
    assert open_ended.is_finished


def test_special_tokens_are_never_text(tokenizer, constraints):
    constraint = constraints.start(Sampling(regex=r"[\s\S]*"))
    specials = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    assert len(specials) == 4
    assert allowed(constraint) & specials == {EOS}
    assert len(allowed(constraint)) > 150  # not the bytes that only go on with a character


def test_a_token_that_was_not_allowed_is_an_error(tokenizer, constraints):
    constraint = constraints.start(Sampling(regex="abc"))
    constraint.accept(tokenizer.token_to_id("b"))
    assert constraint.error
    assert "\n" not in constraint.error
    assert constraint.mask().all()
    assert not constraint.is_finished


def test_nothing_asked_for_is_no_constraint(constraints):
    assert constraints.start(Sampling()) is None
    assert Constraints(None, 300, []).start(Sampling()) is None


def test_answers_to_one_grammar_do_not_disturb_each_other(tokenizer, constraints):
    sampling = Sampling(json_schema=json.dumps(PERSON), seed=3)

    def answer(seed):
        return write(tokenizer, Sampler(sampling, (), constraints.start(sampling)), seed)

    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(answer, range(6)))
    assert together == [answer(seed) for seed in range(6)]
    assert len(set(together)) == 6


def test_a_grammar_is_compiled_once_and_the_latest_are_kept(tokenizer, monkeypatch):
    compiled = []
    real = module._compile
    monkeypatch.setattr(module, "_compile", lambda *given: compiled.append(given[1:]) or real(*given))
    monkeypatch.setattr(module, "_KEPT", 2)
    constraints = Constraints(tokenizer, 300, [EOS])
    for regex in ("a", "b", "a", "a", "c", "a", "b"):
        constraints.start(Sampling(regex=regex))
    assert [text for _, text in compiled] == ["a", "b", "c", "b"]
    constraints.start(Sampling(json_schema="true"))
    for _ in range(3):  # nor is one that is refused
        with pytest.raises(UsageError, match="unclosed"):
            constraints.start(Sampling(regex="["))
    assert len(compiled) == 6


def test_a_schema_of_many_expressions_is_taken_where_none_are_joined(constraints):
    """As classes of settings come out, each field with a pattern of its own."""
    fields = {f"f{n}": {"type": "string", "pattern": f"^[a-z]{{{n + 1}}}$"} for n in range(20)}
    named = {"$ref": "#/$defs/Inner", "nullable": True, "description": "what it is"}
    single = {"allOf": [{"$ref": "#/$defs/Inner"}], "default": None, "title": "Inner"}
    data = {"enum": [{"pattern": str(n)} for n in range(20)]}
    schema = {
        "type": "object", "additionalProperties": False,
        "properties": {**fields, "allOf": {"type": "string"}, "inner": named, "other": single, "data": data},
        "$defs": {"Inner": {"type": "object", "properties": {}, "additionalProperties": False}},
    }  # fmt: skip
    constraints.start(Sampling(json_schema=json.dumps(schema)))


def asked_together(count):
    """Expressions that one text must match, each joined by another keyword to the next."""
    schema = {"type": "string"}
    for number in range(count):
        pattern = {"pattern": f".*{chr(97 + number)}.*"}
        schema = ({"allOf": [pattern, schema]}, {**pattern, "anyOf": [schema]}, {**pattern, "oneOf": [schema]})[number % 3]
    return schema


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"json_schema": ""}, "json_schema is not valid JSON: Expecting value"),
        ({"json_schema": "{} x"}, "json_schema is not valid JSON: Extra data"),
        ({"json_schema": '{}, "max_tokens": 1'}, "json_schema is not valid JSON: Extra data"),
        ({"json_schema": '{"minimum": NaN}'}, "json_schema is not valid JSON: NaN"),
        ({"json_schema": '{"type": "string", "minLength": 1e999}'}, "json_schema is not valid JSON: 1e999 is too large"),
        ({"json_schema": '{"type": "integer", "multipleOf": true}'}, "json_schema cannot be used"),
        ({"json_schema": "[]"}, "json_schema must be a JSON object"),
        ({"json_schema": "false"}, "json_schema cannot be used: Unsatisfiable"),
        ({"json_schema": '{"type": "foo"}'}, "json_schema cannot be used: Invalid type: foo"),
        ({"json_schema": '{"type": "integer", "minimum": 5, "maximum": 3}'}, "Unsatisfiable schema: minimum"),
        ({"json_schema": '{"type": "string", "minLength": -1}'}, "Expected positive integer for 'minLength'"),
        ({"json_schema": '{"$ref": "#/nowhere"}'}, "Pointer '/nowhere' does not exist"),
        ({"json_schema": '{"$ref": "https://example.com/schema"}'}, "json_schema cannot be used: Resource"),
        ({"json_schema": '{"$ref": "#"}'}, "json_schema cannot be used"),
        ({"json_schema": '{"not": {}}'}, 'Unimplemented keys: ."not".'),
        ({"json_schema": '{"type": "array", "uniqueItems": true, "x-guidance": {"lenient": true}}'}, "uniqueItems"),
        ({"json_schema": '{"type": "string", "pattern": "(?=a)b"}'}, "json_schema cannot be used: look-around"),
        ({"json_schema": '{"title": "\\ud800"}'}, "json_schema cannot be used"),
        ({"json_schema": json.dumps({"pattern": ".*" * 1_001})}, "json_schema cannot be used: an expression with 1,001 groups"),
        ({"json_schema": json.dumps({"patternProperties": {"(a|)" * 1_001: {}}})}, "with 1,001 groups and repetitions"),
        ({"json_schema": json.dumps(asked_together(16))}, "it has 16 expressions"),
        *(
            ({"json_schema": json.dumps({**hidden, "$ref": reference})}, "it has 16 expressions")
            for hidden, reference in (
                ({"$defs": asked_together(16)}, "#/$defs"),
                ({"enum": [asked_together(16)]}, "#/enum/0"),
                ({"$defs": {"a": {"const": asked_together(16)}}}, "#/$defs/a%2fconst"),
            )
        ),
        ({"regex": r"\w{0,3}" * 1_001}, "regex cannot be used: an expression with 1,001 groups and repetitions is too complex"),
        ({"regex": "["}, "regex cannot be used: unclosed character class"),
        ({"regex": r"(a)\1"}, "regex cannot be used: backreferences are not supported"),
        ({"regex": r"\bfoo"}, "regex cannot be used: lookarounds not supported"),
        ({"regex": r"[^\x00-\U0010FFFF]"}, "regex cannot be used: there is no text"),
        ({"regex": "\ud800"}, "regex is not valid Unicode text"),
    ],
)
def test_what_cannot_be_held_to_is_refused_in_one_line(constraints, settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        constraints.start(Sampling(**settings))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_schema_may_have_many_expressions_for_different_texts(constraints):
    texts = {f"p{number}": {"type": "string", "pattern": f"^a{{{number}}}$"} for number in range(30)}
    optional = {"anyOf": [{"type": "string", "pattern": "b+"}, {"type": "null"}], "title": "Optional", "default": None}
    schema = {
        "type": "object",
        "properties": texts | {"q": optional, "r": {"$ref": "#/$defs/code"}},
        "$defs": {"code": texts["p3"]},
    }
    constraint = constraints.start(Sampling(json_schema=json.dumps(schema)))
    assert constraint.error is None


def nested(depth):
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


def each(count, make):
    return [make(number) for number in range(count)]


HOSTILE = {
    "deep": nested(2_500),
    "deeper": "[" * 60_000,
    "long": nested(100_000),
    "items": {"type": "array", "minItems": 10**9, "maxItems": 10**9},
    "length": {"type": "string", "minLength": 10**9},
    "pattern": {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"},
    "multiple": {"type": "integer", "multipleOf": 1_000_003},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": 9973}, {"type": "integer", "multipleOf": 9967}]},
    "decimals": {"type": "number", "multipleOf": 99.99},
    "many properties": {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(1_900)}},
    "many values": {"enum": each(2_000, lambda n: {"a": [n, n, {"b": n}]})},
    "product": {"allOf": each(20, lambda n: {"anyOf": [{"properties": {f"a{n}": {}}}, {"properties": {f"b{n}": {}}}]})},
    "alternatives": {"anyOf": each(900, lambda n: {"type": "object", "properties": {f"p{n}": {"type": "integer"}}})},
    "itself": {"anyOf": [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}]},
    "chain": {
        "$defs": {f"n{n}": {"anyOf": [{"$ref": f"#/$defs/n{n + 1}"}, {"$ref": f"#/$defs/n{n + 2}"}]} for n in range(300)}
        | {"n300": {"type": "integer"}, "n301": {"type": "null"}},
        "$ref": "#/$defs/n0",
    },
    "doubling": {
        "$defs": {f"n{n}": {"allOf": [{"$ref": f"#/$defs/n{n + 1}"}, {"$ref": f"#/$defs/n{n + 2}"}]} for n in range(40)}
        | {"n40": {"type": "object"}, "n41": {"type": "object"}},
        "$ref": "#/$defs/n0",
    },
}
HOSTILE |= {f"{count} at once": asked_together(count) for count in (15, 26)}
HOSTILE_REGEXES = [
    "(a{1000}){1000}", "(.{1,1000}){1,1000}", "(a|b)*a(a|b){25}", "(x+x+)+y", "(" * 5_000 + "a" + ")" * 5_000, "a{0,100000}",
    r"[\p{L}]{1,5000}", "(?:(?:.*a){50}.*)", "|".join(f"w{n}x.*y" for n in range(3_000)), "a" * 1_000_000,
    "(([a-z]{1,50}[0-9]{1,50}){1,50}){1,50}", ".*" * 200 + "x", "((a?){200}){200}", r"(\w+\s){1,500}\p{Lu}{3}",
    r"\w*" * 1_000, r"\w*" * 20_000, r"(\w|)" * 1_000, r"\w{0,3}" * 9_000,
]  # fmt: skip


@pytest.fixture(scope="module")
def large(tokenizer):
    """Constraints over 5,000 words: what a step costs grows with them."""
    many = Tokenizer.from_str(tokenizer.to_str())
    numbers = np.random.default_rng(0)
    signs = list("abcdefghijklmnopqrstuvwxyz0123456789 ")
    many.add_tokens(sorted({"".join(numbers.choice(signs, numbers.integers(2, 9))) for _ in range(5_000)}))
    constraints = Constraints(many, many.get_vocab_size(), [EOS])
    constraints.start(Sampling(regex="a"))
    return constraints


@pytest.mark.parametrize(
    "settings",
    [{"json_schema": text if isinstance(text, str) else json.dumps(text)} for text in HOSTILE.values()]
    + [{"regex": regex} for regex in HOSTILE_REGEXES],
    ids=[*HOSTILE, *(regex[:20] for regex in HOSTILE_REGEXES)],
)
def test_a_hostile_grammar_takes_little_time_and_memory(large, settings):
    """Bounds of CPU time and memory that are ten times and more what it takes."""
    memory = psutil.Process()
    before, start = memory.memory_info().rss, time.process_time()
    numbers = np.random.default_rng(0)
    try:
        constraint = large.start(Sampling(**settings))
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        for _ in range(40):
            choices = np.flatnonzero(constraint.mask())
            constraint.accept(int(numbers.choice(choices[choices != EOS]) if len(choices) > 1 else choices[0]))
            if constraint.error or constraint.is_finished:
                break
    assert time.process_time() - start < 8
    assert memory.memory_info().rss - before < 500 * 2**20


def test_a_tokenizer_of_the_sentencepiece_kind():
    """Spaces written as "▁", bytes as tokens of their own."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "a", "▁b", "▁é"]
    model = models.BPE({word: place for place, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    constraints = Constraints(tokenizer, len(words), [2])
    numbers = np.random.default_rng(0)
    for regex in ("( a| b|a|b){5}", "[é ]{4}", "😀 a"):
        for _ in range(5):
            constraint, ids = constraints.start(Sampling(regex=regex)), []
            while not constraint.is_finished:
                ids.append(int(numbers.choice(np.flatnonzero(constraint.mask()))))
                constraint.accept(ids[-1])
            assert constraint.error is None
            assert re.fullmatch(regex, tokenizer.decode(ids))


def test_words_of_the_model_beyond_the_tokenizers_are_never_allowed(tokenizer):
    constraint = Constraints(tokenizer, 512, [EOS, 2]).start(Sampling(regex=r"[\s\S]*"))
    mask = constraint.mask()
    assert mask.shape == (512,)
    assert not mask[tokenizer.get_vocab_size() :].any()
    assert mask[[EOS, 2]].all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda tokenizer: (None, 300, [EOS]), "this model has no tokenizer: json_schema and regex need one"),
        (lambda tokenizer: (tokenizer, 300, []), "this model has no end-of-text token"),
        (lambda tokenizer: (Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")), 2, [1]), "cannot use this tokenizer: "),
        (lambda tokenizer: (tokenizer, 300, [299_999]), "cannot use this tokenizer: "),
    ],
)
def test_a_model_that_cannot_be_held_to_anything_says_so(tokenizer, given, message):
    constraints = Constraints(*given(tokenizer))
    for _ in range(2):
        with pytest.raises(UsageError, match=message) as caught:
            constraints.start(Sampling(regex="a"))
        assert "\n" not in str(caught.value)


def test_without_the_package_one_line_says_how_to_get_it(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"need the llguidance package: pip install 'cadre-lm\[serve\]'"):
        Constraints(tokenizer, 300, [EOS]).start(Sampling(json_schema="{}"))
