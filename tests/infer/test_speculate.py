"""Speculation changes how fast text comes, never the text."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cadre.data.tokenizer import train_tokenizer
from cadre.errors import UsageError
from cadre.infer.engine import Engine, Request
from cadre.infer.runner import Batch
from cadre.infer.sampling import Sampling, choose_batch
from cadre.infer.speculate import Payoff
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer
from tests.infer.test_native import randomized
from tests.shapes import small


def model_of(family: str, modules: int, copying: bool = False, config: ModelConfig | None = None) -> Transformer:
    """`copying`: the modules repeat the main model's weights closely enough to be right often."""
    config = config or small(family, num_nextn_predict_layers=modules, max_position_embeddings=200)
    model = randomized(config, 4, 0.2)
    if copying:
        # A model whose layers add almost nothing, and modules that pass the next token's embedding on: both then answer
        # from the last token alone, and agree.
        with torch.no_grad():
            for block in [*model.layers, *(module.block for module in model.mtp)]:
                for name, parameter in block.named_parameters():
                    if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                        parameter.mul_(0.01)
            for module in model.mtp:
                width = model.config.hidden_size
                module.eh_proj.weight.zero_()
                module.eh_proj.weight[:, :width] = torch.eye(width)
                module.enorm.weight.fill_(1.0)
                module.norm.weight.copy_(model.norm.weight)
            model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def requests(sampled: bool, number: int = 5) -> list[Request]:
    draw = random.Random(7)
    made = []
    for index in range(number):
        prompt = tuple(draw.randrange(31) for _ in range(draw.randint(1, 40)))
        sampling = Sampling(temperature=0.0)
        if sampled:
            penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.2}
            sampling = Sampling(temperature=0.9, top_p=0.95, **penalties, seed=index, logprobs=2)
        made.append(Request(str(index), prompt, draw.randint(1, 50), sampling, ignore_eos=index % 2 == 0))
    return made


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("modules", "drafts"), [(1, 1), (1, 3), (2, 2), (3, 2), (2, 5)])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_the_text_is_that_of_plain_decoding(family: str, modules: int, drafts: int, sampled: bool) -> None:
    model = model_of(family, modules, copying=True)
    plain = Engine(model, cache_bytes=2_000_000, page_size=4).run(requests(sampled))
    engine = Engine(model, cache_bytes=2_000_000, page_size=4, chunk=16, speculate=drafts)
    engine._payoff = Payoff(trial=10**9)  # always on: whether it pays is another test
    assert engine.run(requests(sampled)) == plain
    assert engine.stats.drafts_accepted > 0
    engine.pool.check([])


@pytest.mark.parametrize("sampled", [False, True])
def test_answers_are_held_to_their_grammar(sampled: bool) -> None:
    """Drafts that the grammar forbids are wrong drafts; those it allows count, and its end is the text's."""
    tokenizer = train_tokenizer(["yes no maybe one two three 0123456789"], 300)
    config = small("deepseek_v3", vocab_size=300, num_nextn_predict_layers=1, eos_token_id=1)
    model = model_of("deepseek_v3", 1, copying=True, config=config)
    schema = '{"type": "string", "pattern": "^(yes|no|12){3,7}$"}'
    settings = Sampling(0.9 if sampled else 0.0, seed=5, json_schema=schema)
    held = [
        Request("schema", (2, 3), 60, settings),
        Request("regex", (4, 5), 60, replace(settings, json_schema=None, regex="(one|two|three){3,9}!")),
        Request("free", (6, 7), 20, replace(settings, json_schema=None)),
    ]
    plain = Engine(model, tokenizer, cache_bytes=2_000_000).run(held)
    engine = Engine(model, tokenizer, cache_bytes=2_000_000, speculate=2)
    engine._payoff = Payoff(trial=10**9)
    assert engine.run(held) == plain
    assert engine.stats.drafts_proposed > 0
    (_, text, finish), (_, words, ended), _ = plain
    assert (finish, ended) == ("stop", "stop")
    assert re.fullmatch("(yes|no|12){3,7}", json.loads(text))
    assert re.fullmatch("(one|two|three){3,9}!", words)


def test_who_came_while_drafting_was_off_is_not_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules know nothing of its prompt; they do not read it then, and guesses would be noise."""
    model = model_of("deepseek_v3", 1, copying=True)
    engine = Engine(model, cache_bytes=2_000_000, speculate=1)
    engine._payoff = payoff = Payoff(trial=10**9)
    payoff._size(1).drafting = payoff._size(2).drafting = False
    calls = []
    inner = engine.runner.draft_hidden

    def noting(depth: int, hidden_TD: Tensor, batch: Batch) -> Tensor:
        calls.append(depth)
        return inner(depth, hidden_TD, batch)

    monkeypatch.setattr(engine.runner, "draft_hidden", noting)
    sampling = Sampling(temperature=0.0)
    engine.add(Request("before", tuple(i % 31 for i in range(100)), 60, sampling, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert not calls
    payoff._size(1).drafting = payoff._size(2).drafting = True
    engine.add(Request("after", tuple(i % 30 for i in range(100)), 60, sampling, ignore_eos=True))
    before, after = (live.sequence for live in engine._live.values())
    while len(engine._live) == 2:
        assert not before.drafts
        known = before.missed, after.missed
        engine.step()
    assert known[0] > 100 and known[1] == 0
    assert engine.stats.drafts_proposed > 20


@pytest.mark.parametrize("drafts", [1, 4])
def test_small_pools_preempt_and_change_nothing(drafts: int) -> None:
    model = model_of("deepseek_v3", 1, copying=True)
    plain = Engine(model, cache_bytes=2_000_000, page_size=4).run(requests(True))
    per_page = 4 * Engine(model, cache_bytes=2_000_000, page_size=4, speculate=drafts).pool.bytes_per_token
    engine = Engine(model, cache_bytes=28 * per_page, page_size=4, speculate=drafts)
    engine._payoff = Payoff(trial=10**9)
    assert engine.run(requests(True)) == plain
    assert engine.stats.preemptions > 0
    engine.pool.check([])


@pytest.mark.parametrize("seed", range(4))
def test_exceptions_anywhere_in_a_pass_change_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between two drafts, and in drafting itself: what was not finished is computed again, and no page is written that
    is not the sequence's own."""
    model, chance = model_of("deepseek_v3", 2, copying=True), random.Random(seed)
    plain = Engine(model, cache_bytes=2_000_000, page_size=4).run(requests(True))
    engine = Engine(model, cache_bytes=2_000_000, page_size=4, speculate=3)
    engine._payoff = Payoff(trial=10**9)
    for request in requests(True):
        engine.add(request)
    ids: dict[str, list[int]] = {request.id: [] for request in requests(True)}

    def fragile(work):
        def maybe(*given):
            if chance.random() < 0.1:
                raise RuntimeError("out of memory")
            return work(*given)

        return maybe

    monkeypatch.setattr("cadre.infer.engine.choose_batch", fragile(choose_batch))
    for name in ("hidden", "logits", "draft_hidden"):
        monkeypatch.setattr(engine.runner, name, fragile(getattr(engine.runner, name)))
    steps = 0
    while engine.busy:
        steps += 1
        assert steps < 2000, "it makes no progress"
        for sequence in engine.scheduler.active:
            assert not sequence.drafts or len(sequence.ids) + len(sequence.drafts) <= len(sequence.pages) * 4
        try:
            outputs = engine.step()
        except RuntimeError:
            continue
        for output in outputs:
            ids[output.id] += [token.id for token in output.tokens]
        engine.pool.check(sequence.pages for sequence in engine.scheduler.active)
    assert list(ids.values()) == [own for own, _, _ in plain]


def test_right_drafts_save_passes() -> None:
    model = model_of("deepseek_v3", 1, copying=True)
    engine = Engine(model, cache_bytes=2_000_000, speculate=1)
    engine._payoff = Payoff(trial=10**9)
    engine.run([Request("0", (1, 2, 3), 60, Sampling(temperature=0.0), ignore_eos=True)])
    stats = engine.stats
    assert stats.generated_tokens == 60
    assert stats.steps <= 60 - stats.drafts_accepted + 1


def test_a_perfect_module_is_always_right() -> None:
    """The modules' caches and positions are the model's: with modules made to agree, every draft of any depth is accepted."""
    model = model_of("deepseek_v3", 2, copying=True)
    with torch.no_grad():
        for block in [*model.layers, *(module.block for module in model.mtp)]:
            for name, parameter in block.named_parameters():
                if name.endswith(("o_proj.weight", "o_proj.bias", "down_proj", "down_proj.weight")):
                    parameter.zero_()
    engine = Engine(model, cache_bytes=2_000_000, speculate=3)
    engine._payoff = Payoff(trial=10**9)
    engine.run([Request("0", (1, 2, 3), 60, Sampling(temperature=0.0), ignore_eos=True)])
    assert engine.stats.drafts_accepted == engine.stats.drafts_proposed > 40


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_drafts_are_what_the_modules_say_of_the_whole_text(modules: int) -> None:
    """Caches kept over passes, right and wrong drafts and chunks of prompt against recomputation from the beginning."""
    model = randomized(small("deepseek_v3", num_nextn_predict_layers=modules, max_position_embeddings=200), 8, 0.2)
    engine = Engine(model, cache_bytes=2_000_000, page_size=4, chunk=5, speculate=modules)
    engine._payoff = Payoff(trial=10**9)
    prompt = tuple(random.Random(2).randrange(31) for _ in range(23))
    engine.add(Request("0", prompt, 20, Sampling(temperature=1.0, seed=3), ignore_eos=True))
    compared = 0
    while engine.busy:
        engine.step()
        for sequence in engine.scheduler.active:
            if not sequence.drafts:
                continue
            ids, told = sequence.ids, list(sequence.drafts)
            with torch.inference_mode():
                hidden = model.hidden(torch.tensor([ids[:-1]]))
                for depth in range(len(told)):
                    known = (ids + told)[depth + 1 :][: len(ids) - 1]
                    hidden = model.mtp_hidden(hidden, torch.tensor([known]), depth)
                    best = model.lm_head(hidden[0, -1]).topk(2)
                    assert told[depth] == best.indices[0] or best.values[0] - best.values[1] < 1e-4
            compared += 1
    assert compared >= 15


def test_models_without_modules_are_refused() -> None:
    with pytest.raises(UsageError, match="multi-token prediction"):
        Engine(randomized(small("llama"), 1), cache_bytes=1_000_000, speculate=1)


class TestPayoff:
    """Rates here are invented: the rule is arithmetic."""

    def run(self, passes: int, with_drafts: float, without: float) -> list[bool]:
        payoff, ran = Payoff(trial=5, period=50), []
        for _ in range(passes):
            drafting = payoff.drafting(1)
            ran.append(drafting)
            payoff.record(1, 1, 100, 100 / (with_drafts if drafting else without))
        return ran

    def test_it_stays_off_where_it_is_slower(self) -> None:
        ran = self.run(1000, with_drafts=80.0, without=100.0)
        assert sum(ran) < 0.15 * len(ran)

    def test_it_stays_on_where_it_is_faster(self) -> None:
        ran = self.run(1000, with_drafts=130.0, without=100.0)
        assert sum(ran) > 0.85 * len(ran)

    def test_batches_of_other_sizes_are_judged_apart(self) -> None:
        payoff = Payoff(trial=5, period=50)
        for _ in range(6):
            payoff.record(1, 1, 1, 1.0)
        assert not payoff.drafting(1)
        assert payoff.drafting(8)

    def test_passes_whose_sequences_the_modules_do_not_know_are_no_trial(self) -> None:
        """Requests that came while drafting was off cannot be drafted; what their passes give says nothing of drafts."""
        payoff = Payoff(trial=5, period=50)
        for _ in range(10):
            payoff.record(8, 8, 10, 0.1)  # both ways tried, neither faster
        for _ in range(50):
            payoff.record(8, 8, 10, 0.1)
        assert payoff.drafting(8)
        for _ in range(30):
            payoff.record(8, 3, 1, 10.0)
            assert payoff.drafting(8)
        for _ in range(5):
            payoff.record(8, 5, 20, 0.1)
        assert payoff.drafting(8)  # twice as fast: it stays

    def test_a_trial_does_not_wait_for_ever(self) -> None:
        payoff = Payoff(trial=5, period=50)
        for _ in range(50):
            assert payoff.drafting(8)
            payoff.record(8, 0, 10, 0.1)
        assert not payoff.drafting(8)
