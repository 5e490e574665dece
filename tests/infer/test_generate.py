import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cadre
from cadre.data.tokenizer import train_tokenizer
from cadre.errors import RunError, UsageError
from cadre.infer import generate as module
from cadre.infer.engine import Engine
from cadre.infer.generate import encode_prompt, generate, generate_ids, stream
from cadre.model.transformer import Transformer
from tests.shapes import FAMILIES, small

PROMPT = "The people of"


@torch.inference_mode()
def greedy_without_cache(model, ids, count):
    ids = list(ids)
    ends = model.config.end_tokens
    for _ in range(count):
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[-count:] if count else []


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_equal_those_without_a_cache(family):
    model = Transformer(small(family, initializer_range=0.3)).initialize(2)
    ids = [3, 1, 4, 1, 5]
    expected = greedy_without_cache(model, ids, 30)
    assert generate_ids(model, ids, max_new_tokens=30, temperature=0) == expected
    assert len(set(expected)) > 3


def test_float32_weights_decode_in_the_compute_dtype(model, tokenizer):
    half = Transformer(model.config).initialize(0)
    half.compute_dtype = torch.bfloat16
    assert Engine(half, cache_bytes=10**6).pool.first.dtype == torch.bfloat16
    assert generate_ids(half, [5, 6], max_new_tokens=5, temperature=0)


@given(seed=st.integers(0, 2**32), temperature=st.floats(0.3, 2.0))
def test_stream_joined_is_the_generated_text(model, tokenizer, seed, temperature):
    options = dict(max_new_tokens=40, temperature=temperature, seed=seed)
    parts = list(stream(model, tokenizer, PROMPT, **options))
    text = "".join(parts)
    assert generate(model, tokenizer, PROMPT, **options) == text
    prompt_ids = tokenizer.encode(PROMPT).ids
    whole = tokenizer.decode(prompt_ids + generate_ids(model, prompt_ids, **options))
    assert whole.startswith(PROMPT + text)
    assert not whole[len(PROMPT + text) :].strip("\ufffd")
    assert all(parts)


def test_text_comes_while_the_model_writes(model, tokenizer):
    pieces = stream(model, tokenizer, PROMPT, max_new_tokens=50, seed=0)
    next(pieces)
    assert len(list(pieces)) > 10


@given(seed=st.integers(0, 1000), start=st.integers(0, 20), length=st.integers(1, 6))
def test_stop_strings_across_tokens(model, tokenizer, seed, start, length):
    text = generate(model, tokenizer, PROMPT, max_new_tokens=40, seed=seed)
    stop = text[start : start + length]
    if not stop:
        return
    parts = list(stream(model, tokenizer, PROMPT, max_new_tokens=40, seed=seed, stop=["never ever", stop]))
    assert "".join(parts) == text.partition(stop)[0]


def test_a_single_stop_string_is_not_taken_apart(model, tokenizer):
    text = generate(model, tokenizer, PROMPT, max_new_tokens=40, seed=1)
    assert generate(model, tokenizer, PROMPT, max_new_tokens=40, seed=1, stop=text[8:11]) == text.partition(text[8:11])[0]


def test_the_end_of_text_token_ends(model, tokenizer):
    prompt = tokenizer.encode(PROMPT).ids
    ids = generate_ids(model, prompt, max_new_tokens=12, temperature=0)
    third = ids[ids.index(ids[3])]
    for ends in (third, [2, third]):
        ending = Transformer(model.config.model_copy(update={"eos_token_id": ends}))
        ending.load_state_dict(model.state_dict())
        assert generate_ids(ending, prompt, max_new_tokens=12, temperature=0) == ids[: ids.index(third)]


def test_seeds(model, tokenizer):
    texts = [generate(model, tokenizer, PROMPT, max_new_tokens=30, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    free = {generate(model, tokenizer, PROMPT, max_new_tokens=30) for _ in range(3)}
    assert len(free) > 1


def test_generation_leaves_the_global_random_state_alone(model, tokenizer):
    before = torch.get_rng_state()
    generate(model, tokenizer, PROMPT, max_new_tokens=5, seed=9)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_empty_prompt_starts_a_document(model, tokenizer):
    """Cadre packs documents as text and end-of-text: what comes after one is a beginning."""
    assert encode_prompt(model.config, tokenizer, "") == [1]
    assert generate(model, tokenizer, "", max_new_tokens=9, seed=3)


def test_a_tokenizer_that_begins_texts_itself_is_respected(model):
    from tokenizers import processors

    tokenizer = train_tokenizer(["the union " * 20], 300)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    assert encode_prompt(model.config, tokenizer, "") == [0]
    assert encode_prompt(model.config, tokenizer, "the")[0] == 0


def test_generation_fills_the_context_and_stops(model, tokenizer):
    context = model.config.max_position_embeddings
    ids = [5] * (context - 4)
    assert len(generate_ids(model, ids, max_new_tokens=100, seed=0)) == 4
    assert generate_ids(model, [5] * context, max_new_tokens=100, seed=0) == []
    with pytest.raises(UsageError, match=f"the prompt has {context + 1} tokens, but the model's context is {context}"):
        generate_ids(model, [5] * (context + 1))
    with pytest.raises(UsageError, match="context is 64"):
        generate(model, tokenizer, "yes " * 100)


def test_training_after_generation(model):
    """What generation leaves in the model must not be barred from autograd."""
    fresh = Transformer(model.config).initialize(0)
    generate_ids(fresh, [3, 4], max_new_tokens=3)
    fresh.train()(torch.tensor([[3, 4, 5]])).sum().backward()
    assert fresh.embed_tokens.weight.grad is not None


def test_a_consumer_of_the_stream_is_not_in_inference_mode(model, tokenizer):
    for _ in stream(model, tokenizer, PROMPT, max_new_tokens=3, seed=0):
        assert not torch.is_inference_mode_enabled()


def test_the_cache_is_just_large_enough(model, monkeypatch):
    """Pages for prompt and continuation, those for more than the context holds never."""
    made = []
    init = Engine.__init__

    def noting(self, *arguments, **options):
        init(self, *arguments, **options)
        made.append(self.pool.tokens)

    monkeypatch.setattr(Engine, "__init__", noting)
    generate_ids(model, [3] * 20, max_new_tokens=13)
    generate_ids(model, [3] * 20, max_new_tokens=10**9)
    assert made == [48, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"seed": -1}, "seed is -1; it must be from 0"),
        ({"seed": 2**64}, "seed is"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"stop": [""]}, "stop string is empty"),
        ({"stop": ""}, "stop string is empty"),
    ],
)
def test_bad_options_are_refused_at_the_call(model, tokenizer, options, message):
    with pytest.raises(UsageError, match=message):
        stream(model, tokenizer, PROMPT, **options)


def test_bad_prompts_are_refused(model, tokenizer):
    with pytest.raises(UsageError, match="not valid Unicode text"):
        generate(model, tokenizer, "half a pair \ud83d")
    for prompt in (7, None, {PROMPT}):
        with pytest.raises(UsageError, match=r"the prompt is a .*; it must be one text, or a list of them"):
            generate(model, tokenizer, prompt)
    with pytest.raises(UsageError, match=r"^prompt 2 of 3: the prompt is a list; it must be one text$"):
        generate(model, tokenizer, [PROMPT, [PROMPT], PROMPT])
    with pytest.raises(UsageError, match=r"^prompt 3 of 3: the prompt has \d+ tokens, but the model's context is 64"):
        generate(model, tokenizer, [PROMPT, "", "yes " * 100])
    with pytest.raises(UsageError, match="no tokens"):
        generate_ids(model, [])
    for token in (300, -1):
        with pytest.raises(UsageError, match=f"token id {token} is outside"):
            generate_ids(model, [3, token])


WORDS = ["The", "people", "of", "the", "union", "answered", "yes", "we", "do", "café", "你好", "😀"]


def prompts_of(count):
    return [" ".join(WORDS[(place * step) % len(WORDS)] for step in range(1, 2 + place % 5)) for place in range(count)]


@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_prompts_of_a_list_are_continued_as_each_is_alone(family, tokenizer):
    config = small(family, vocab_size=300, initializer_range=0.3, bos_token_id=0, eos_token_id=1)
    model = Transformer(config).initialize(0)
    prompts = ["", *prompts_of(20)]
    texts = generate(model, tokenizer, prompts, max_new_tokens=12, temperature=0, stop="yes")
    assert texts == [generate(model, tokenizer, each, max_new_tokens=12, temperature=0, stop="yes") for each in prompts]
    assert len(set(texts)) > 10
    assert generate(model, tokenizer, (PROMPT,), seed=3) == [generate(model, tokenizer, PROMPT, seed=3)]
    assert generate(model, tokenizer, []) == []


def test_prompts_of_a_list_draw_each_by_a_seed_of_its_own(model, tokenizer):
    texts = generate(model, tokenizer, [PROMPT] * 3, max_new_tokens=20, seed=7)
    assert texts == [generate(model, tokenizer, PROMPT, max_new_tokens=20, seed=seed) for seed in (7, 8, 9)]
    assert len(set(texts)) == 3


def test_more_prompts_than_run_at_once(model, tokenizer, monkeypatch):
    """Whoever comes later waits outside the engine; with a cache for one of them at a time all still come to their end."""
    alone = generate(model, tokenizer, prompts_of(12), max_new_tokens=8, temperature=0)
    monkeypatch.setattr(module, "_AT_ONCE", 3)
    monkeypatch.setattr(module, "_AHEAD", 1)
    monkeypatch.setattr(module, "free_bytes", lambda device: 0)
    most = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: most.append(len(self._live)) or step(self))
    assert generate(model, tokenizer, prompts_of(12), max_new_tokens=8, temperature=0) == alone
    assert max(most) == 4


def test_penalties_and_constraints(model, tokenizer):
    plain = generate(model, tokenizer, PROMPT, max_new_tokens=20, seed=1)
    for name, value in (("repetition_penalty", 9.0), ("presence_penalty", 2.0), ("frequency_penalty", 2.0), ("min_p", 0.9)):
        assert generate(model, tokenizer, PROMPT, max_new_tokens=20, seed=1, **{name: value}) != plain, name
    assert generate(model, tokenizer, [PROMPT], max_new_tokens=20, seed=1, regex="(yes|we do)")[0] in ("yes", "we do")
    schema = {"enum": ["we", "do"]}
    for given_schema in (schema, '{"enum": ["we", "do"]}'):
        assert generate(model, tokenizer, PROMPT, max_new_tokens=20, json_schema=given_schema) in ('"we"', '"do"')
    with pytest.raises(UsageError, match="json_schema and regex are both given"):
        generate(model, tokenizer, PROMPT, json_schema=schema, regex="a")
    with pytest.raises(TypeError, match="temprature"):
        generate(model, tokenizer, PROMPT, temprature=1)


def test_a_model_without_finite_logits_fails_clearly(model):
    broken = Transformer(model.config).initialize(0)
    broken.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        generate_ids(broken, [3])


def test_generate_is_a_name_of_the_package():
    assert cadre.generate is generate
