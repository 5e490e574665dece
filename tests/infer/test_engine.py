import math
import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cadre.errors import UsageError
from cadre.infer.engine import Engine, Request
from cadre.infer.pages import bytes_for
from cadre.infer.sampling import Sampler, Sampling, choose_batch, token_logprobs
from cadre.model.transformer import Transformer
from tests.infer.conftest import CORNERS, assert_close, lively
from tests.shapes import small

MODELS = {name: lively(config, seed=3) for name, config in CORNERS.items()}
WORDS = 31


@torch.inference_mode()
def plain_logits(model, ids):
    return model(torch.tensor([list(ids)]))[0]


def alone(model, request):
    """The ids that a request gets without any engine or cache, and why it ends."""
    ids, sampler = list(request.prompt_ids), Sampler(request.sampling, request.prompt_ids)
    limit = min(len(ids) + request.max_new_tokens, model.config.max_position_embeddings)
    while len(ids) < limit:
        token = sampler.choose(plain_logits(model, ids)[-1]).id
        if token in model.config.end_tokens and not request.ignore_eos:
            return ids[len(request.prompt_ids) :], "stop"
        sampler.accept(token)
        ids.append(token)
    return ids[len(request.prompt_ids) :], "length"


def engine_for(model, pages=16, page_size=4, **options):
    cache_bytes = pages * bytes_for(model.config, page_size, torch.float32, page_size)
    return Engine(model, cache_bytes=cache_bytes, page_size=page_size, **options)


def assert_distribution(tokens, logits):
    """What tokens report of all words is the plain forward pass's log-softmax."""
    told = torch.tensor([[p for _, p in sorted(token.top)] for token in tokens]).view(-1, WORDS)
    want = logits.log_softmax(-1)
    assert_close(told, want)
    for token, row in zip(tokens, want, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4 * max(1.0, float(row.abs().max())))


@st.composite
def mixes(draw):
    """Requests with the step they arrive at and, for some, the step they are given up at; some begin alike."""
    stems = draw(st.lists(st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=30), min_size=1, max_size=2))
    mix = []
    for number in range(draw(st.integers(1, 6))):
        stem = draw(st.sampled_from(stems))
        prompt = stem[: draw(st.integers(1, len(stem)))] + draw(st.lists(st.integers(0, WORDS - 1), max_size=6))
        request = Request(
            id=str(number),
            prompt_ids=tuple(prompt),
            max_new_tokens=draw(st.integers(0, 12)),
            sampling=Sampling(draw(st.sampled_from([0.0, 1.0])), seed=draw(st.integers(0, 99)), logprobs=WORDS),
            routes=draw(st.booleans()),
            prompt_logprobs=draw(st.sampled_from([False, False, True])),
        )
        mix.append((request, draw(st.integers(0, 8)), draw(st.none() | st.integers(0, 12))))
    return mix


@given(
    corner=st.sampled_from(list(MODELS)),
    mix=mixes(),
    page_size=st.integers(1, 9),
    spare=st.integers(0, 5),
    max_batch=st.integers(1, 5),
    chunk=st.integers(1, 24),
    sharing=st.booleans(),
)
@settings(max_examples=40)
def test_every_request_gets_what_it_would_get_alone(corner, mix, page_size, spare, max_batch, chunk, sharing):
    """Whatever runs beside it, however its prompt is cut and its pages lie, shared and preempted or not."""
    model = MODELS[corner]
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request, _, _ in mix)
    pages = -(-longest // page_size) + spare
    engine = engine_for(model, pages, page_size, max_batch=max_batch, chunk=chunk, prefix_sharing=sharing)
    outputs = {request.id: [] for request, _, _ in mix}
    steps = 0
    while steps < 13 or engine.busy:
        for request, arrival, given_up in mix:
            if arrival == steps:
                engine.add(request)
            if given_up == steps:
                engine.abort(request.id)
        for output in engine.step():
            assert not outputs[output.id] or outputs[output.id][-1].finish is None, "told after the end"
            outputs[output.id].append(output)
        engine.pool.check(sequence.pages for sequence in engine.scheduler.active)
        assert all(not sequence.pages for sequence in engine.scheduler.waiting)
        assert len(engine.scheduler.active) <= max_batch
        steps += 1
        assert steps < 500
    assert engine.pool.free == pages
    for request, arrival, given_up in mix:
        told = outputs[request.id]
        tokens = [token for output in told for token in output.tokens]
        want, finish = alone(model, request)
        ids = [token.id for token in tokens]
        if told[-1].finish == "abort":
            assert given_up is not None and given_up >= arrival
            assert ids == want[: len(ids)]
        else:
            assert (ids, told[-1].finish) == (want, finish)
        assert all(output.prompt_tokens == len(request.prompt_ids) for output in told)
        assert sharing or not any(output.cached_tokens for output in told)
        logits = plain_logits(model, [*request.prompt_ids, *ids])
        assert_distribution(tokens, logits[len(request.prompt_ids) - 1 :][: len(ids)])
        assert all((token.experts is not None) == request.routes for token in tokens)
        if request.prompt_logprobs and told[-1].finish != "abort":
            first, *rest = told[0].prompt_logprobs
            assert (first.id, first.logprob) == (request.prompt_ids[0], None)
            assert tuple(token.id for token in rest) == request.prompt_ids[1:]
            assert_distribution(rest, logits[: len(rest)])
        assert all(output.prompt_logprobs is None for output in told[1:])


def test_the_mixes_do_what_they_are_for():
    """A mix of this kind preempts, shares and waits: the test above is no test of idle parts."""
    model = MODELS["latent, experts"]
    engine = engine_for(model, pages=9, page_size=4, max_batch=3, chunk=8)
    requests = [Request(str(n), (*range(12), n), 12, Sampling(1.0, seed=n)) for n in range(5)]
    for request in requests:
        engine.add(request)
    most_waiting = 0
    while engine.busy:
        engine.step()
        most_waiting = max(most_waiting, engine.stats.waiting)
    assert engine.stats.preemptions > 0
    assert engine.stats.cached_prompt_tokens > 0
    assert most_waiting > 0
    assert engine.stats.generated_tokens == 60


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("torchs", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_in_bfloat16_a_hundred_others_change_no_token(family, torchs, speculate, monkeypatch):
    """Prompts short and long, in a pool that preempts; whether torch computes in bfloat16 or in float32. The weights make
    logits lie close together: a difference in their last bits would show."""
    monkeypatch.setattr("cadre.infer.runner._best_dtype", lambda device: torchs)
    config = small(family, max_position_embeddings=1000, num_nextn_predict_layers=1)
    model = lively(config, 5).to(torch.bfloat16)
    draw = random.Random(5)
    lengths = [500, 210, *[draw.randint(1, 30) for _ in range(96)], 260, 700]
    requests = [
        Request(str(n), tuple(draw.randrange(WORDS) for _ in range(length)), 30, Sampling(1.0, seed=n), ignore_eos=True)
        for n, length in enumerate(lengths)
    ]

    def engine(tokens):
        made = Engine(
            model, cache_bytes=bytes_for(config, tokens, torch.bfloat16, 4, 2 + bool(speculate)), page_size=4, max_batch=100,
            chunk=256, prefix_sharing=False, speculate=speculate,
        )  # fmt: skip
        made._payoff.trial = 10**9
        return made

    together = engine(sum(lengths) + 900)
    rows = []
    inner = together.runner.hidden
    monkeypatch.setattr(together.runner, "hidden", lambda batch: rows.append(len(batch.count_B)) or inner(batch))
    got = together.run(requests)
    assert max(rows) > 90
    assert together.stats.preemptions > 0
    alone = engine(1000)
    for place in (0, 1, 2, 30, 60, 97, 98, 99):
        assert alone.run([requests[place]]) == [got[place]]


def request(prompt=(3, 4, 5), new=6, name="a", **options):
    return Request(name, tuple(prompt), new, options.pop("sampling", Sampling(0.0)), **options)


def finishes(engine, steps=50):
    """What is told until nothing is left to do."""
    told = []
    for _ in range(steps):
        if not engine.busy:
            return told
        told += engine.step()
    raise AssertionError("it does not end")


@pytest.fixture
def engine():
    return engine_for(MODELS["latent, experts"])


def test_routes_are_the_routers_choices_for_the_position_before(engine):
    model = engine.runner.model
    mixed = [request(name="a", routes=True), request((9, 8), name="b"), request((7,), name="c", routes=True)]
    for one in mixed:
        engine.add(one)
    told = {one.id: [] for one in mixed}
    for output in finishes(engine):
        told[output.id] += output.tokens
    for one in mixed:
        routes = []
        hook = model.layers[1].mlp.gate.register_forward_hook(lambda *parts, seen=routes: seen.append(parts[2].expert_TK))
        ids = [token.id for token in told[one.id]]
        plain_logits(model, [*one.prompt_ids, *ids])
        hook.remove()
        for place, token in enumerate(told[one.id]):
            if not one.routes:
                assert token.experts is None
            else:
                (experts,) = token.experts  # of the one sparse layer
                assert sorted(experts) == sorted(routes[0][len(one.prompt_ids) - 1 + place].tolist())


def test_scoring_needs_no_new_token(engine):
    engine.add(request(range(20), 0, prompt_logprobs=True))
    (output,) = finishes(engine)
    assert (output.tokens, output.finish, output.cached_tokens) == ((), "length", 0)
    assert len(output.prompt_logprobs) == 20
    assert all(token.top == () and token.logprob < 0 for token in output.prompt_logprobs[1:])
    # Its pages serve others, but scoring itself needs every position's logits.
    for scored, cached in ((True, 0), (False, 16)):
        engine.add(request(range(20), 0 if scored else 1, prompt_logprobs=scored))
        assert finishes(engine)[-1].cached_tokens == cached


def test_nothing_to_generate_costs_nothing(engine):
    engine.add(request(new=0))
    (output,) = finishes(engine, 2)
    assert (output.tokens, output.finish, output.prompt_tokens) == ((), "length", 3)
    assert engine.runner.load().sum() == 0


def test_the_end_of_text_token_ends_unless_ignored():
    model = MODELS["grouped, dense"]
    ids = alone(model, request(new=8))[0]
    ending = Transformer(model.config.model_copy(update={"eos_token_id": [ids[3], WORDS - 1]}))
    ending.load_state_dict(model.state_dict())
    (stopped, _, why), (whole, _, _) = engine_for(ending).run([request(new=8), request(new=8, name="b", ignore_eos=True)])
    assert (stopped, why) == (ids[: ids.index(ids[3])], "stop")
    assert whole == ids


def test_text_and_stop_strings(model, tokenizer):
    engine = engine_for(model, pages=64, tokenizer=tokenizer)
    prompt = tuple(tokenizer.encode("The people of").ids)
    ((ids, text, _),) = engine.run([request(prompt, 30, sampling=Sampling(0.8, seed=1))])
    assert text == tokenizer.decode([*prompt, *ids])[len("The people of") :].rstrip("\ufffd")
    stop = text[5:8]
    others = [request(prompt, 30, name=str(n), sampling=Sampling(0.8, seed=n)) for n in range(4)]
    stopped = engine.run([request(prompt, 30, name="s", sampling=Sampling(0.8, seed=1), stop=("never ever", stop)), *others])
    assert stopped[0][1:] == (text.partition(stop)[0], "stop")
    assert stopped[2][1] == text  # the same seed beside it is not stopped


def test_text_held_back_is_given_at_the_end(model, tokenizer):
    """A stop string may begin with the last character of any text; it is not one until it is complete."""
    engine = engine_for(model, pages=64, tokenizer=tokenizer)
    prompt = tuple(tokenizer.encode("The people of").ids)
    for new in range(1, 10):
        ((_, text, _),) = engine.run([request(prompt, new)])
        stops = tuple(character + "\0" for character in set(text))
        assert engine.run([request(prompt, new, stop=stops)])[0][1] == text


def test_a_deadline_ends_running_and_waiting_requests():
    engine = engine_for(MODELS["latent, dense"], max_batch=1)
    engine.add(request(new=40, deadline=time.monotonic() + 1000))
    engine.add(request(name="b", deadline=time.monotonic() - 1))
    engine.add(request(name="c", deadline=math.inf))
    told = engine.step()
    assert [(output.id, output.finish) for output in told] == [("b", "deadline"), ("a", None)]
    engine._live["a"].sequence.request = request(new=40, deadline=0.0)
    told = engine.step()
    assert ("a", "deadline") in [(output.id, output.finish) for output in told]
    assert finishes(engine)[-1].finish == "length"
    assert engine.pool.free == engine.pool.pages


def test_abort_ends_a_request_wherever_it_is():
    engine = engine_for(MODELS["latent, dense"], max_batch=1, chunk=4)
    for name in "abc":
        engine.add(request(range(10), name=name))
    engine.step()  # a reads, b and c wait
    engine.abort("a")
    engine.abort("c")
    engine.abort("nobody")
    told = finishes(engine)
    assert [(output.id, output.finish) for output in told if output.finish] == [("a", "abort"), ("c", "abort"), ("b", "length")]
    engine.abort("b")
    assert not engine.busy
    assert engine.stats.prompt_tokens == 2 * 10  # "c" never left the queue: nobody looked for its prompt in the cache


def test_an_id_can_be_used_again_but_not_at_once(engine):
    engine.add(request())
    with pytest.raises(UsageError, match="'a' is in use"):
        engine.add(request())
    first = finishes(engine)
    engine.add(request())
    assert [output.tokens for output in finishes(engine)] == [output.tokens for output in first]


def test_damaged_weights_end_only_their_own_requests_in_error():
    """An embedding that is not finite harms who meets it."""
    model = lively(CORNERS["latent, dense"])
    with torch.no_grad():
        model.embed_tokens.weight[30] = float("nan")
    engine = engine_for(model)
    for prompt, name in (((30, 3), "bad"), ((3, 4), "good"), ((3, 30), "scored")):
        engine.add(request(prompt, 0 if name == "scored" else 3, name=name, prompt_logprobs=name == "scored"))
    ends = {output.id: output.finish for output in finishes(engine) if output.finish}
    assert ends == {"bad": "error", "good": "length", "scored": "error"}
    assert engine.pool.free == engine.pool.pages


class Script:
    """A constraint that lets one text through, or breaks down at some point of it."""

    error = None

    def __init__(self, ids, broken_at=None):
        self.ids, self.broken_at, self.place = ids, broken_at, 0

    def mask(self):
        if self.place == self.broken_at:
            self.error = "it is too complex"
        return torch.arange(WORDS).eq(self.ids[self.place]).numpy()

    def accept(self, token):
        self.place += 1

    @property
    def is_finished(self):
        return self.place == len(self.ids)


def test_a_constraint_ends_its_own_request_where_its_text_is_whole_or_it_breaks_down(engine, monkeypatch):
    scripts = {"whole": Script([5, 9, 2]), "broken": Script([5, 9, 2], broken_at=2)}
    monkeypatch.setattr(engine.constraints, "start", lambda sampling: scripts.get(sampling.regex))
    for name in (*scripts, "free"):
        engine.add(request(name=name, sampling=Sampling(0.0, regex=name if name in scripts else None)))
    told = {name: [] for name in (*scripts, "free")}
    ends = {}
    for output in finishes(engine):
        told[output.id] += [token.id for token in output.tokens]
        ends[output.id] = output.finish
    assert ends == {"whole": "stop", "broken": "error", "free": "length"}
    assert (told["whole"], told["broken"]) == ([5, 9, 2], [5, 9])
    assert told["free"] == alone(engine.runner.model, request())[0]


def test_an_exception_in_a_step_loses_nothing(monkeypatch):
    model = MODELS["latent, experts"]
    engine = engine_for(model, chunk=5)
    engine.runner.native = None
    mixed = [request(range(n, n + 9), 6, name=str(n), sampling=Sampling(1.0, seed=n), prompt_logprobs=n == 1) for n in range(3)]
    for one in mixed:
        engine.add(one)
    told, chance = {one.id: [] for one in mixed}, random.Random(0)

    def fragile(work):
        """Fails often, before or after its work."""

        def maybe(*given):
            if chance.random() < 0.2:
                raise RuntimeError("out of memory")
            result = work(*given)
            if chance.random() < 0.2:
                raise RuntimeError("out of memory")
            return result

        return maybe

    monkeypatch.setattr(model.layers[1].mlp, "forward", fragile(model.layers[1].mlp.forward))
    monkeypatch.setattr("cadre.infer.engine.choose_batch", fragile(choose_batch))
    monkeypatch.setattr("cadre.infer.engine.token_logprobs", fragile(token_logprobs))
    steps = 0
    while engine.busy:
        steps += 1
        assert steps < 2000, "it makes no progress"
        try:
            outputs = engine.step()
        except RuntimeError:
            continue
        for output in outputs:
            told[output.id].append(output)
        engine.pool.check(sequence.pages for sequence in engine.scheduler.active)
    monkeypatch.undo()
    for one in mixed:
        assert [token.id for output in told[one.id] for token in output.tokens] == alone(model, one)[0]
    assert len(told["1"][0].prompt_logprobs) == 9


def test_generation_ends_where_the_context_or_the_cache_does():
    model = MODELS["grouped, experts"]
    small_engine = engine_for(model, pages=3, page_size=4)
    assert small_engine.max_length == 12
    assert engine_for(model, pages=100).max_length == 64
    ((ids, _, finish),) = small_engine.run([request(range(8), 100)])
    assert (len(ids), finish) == (4, "length")
    assert ids == alone(model, request(range(8), 4))[0]
    ((ids, _, finish),) = small_engine.run([request(range(12), 100)])
    assert (ids, finish) == ([], "length")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompt=()), "the prompt has no tokens"),
        (dict(prompt=(3, 31)), r"token id 31 is outside the model's vocabulary \(0 to 30\)"),
        (dict(prompt=(-1,)), "token id -1 is outside"),
        (dict(prompt=[3] * 65), "the prompt has 65 tokens, but the model's context is 64: shorten it"),
        (dict(prompt=[3] * 41), "the prompt has 41 tokens, but the cache holds 40: shorten it, or give more"),
        (dict(new=-1), "max_new_tokens is -1"),
        (dict(stop=("x",)), "stop strings need a tokenizer"),
        (dict(sampling=Sampling(regex="a*")), "json_schema and regex need one"),
        (dict(sampling=Sampling(logit_bias=((31, 1.0),))), "logit_bias has token id 31"),
    ],
)
def test_requests_that_can_never_run_are_refused_and_forgotten(changes, message):
    engine = engine_for(MODELS["grouped, dense"], pages=10)
    with pytest.raises(UsageError, match=message):
        engine.add(request(**changes))
    assert not engine.busy
    with pytest.raises(UsageError, match=message):
        engine.run([request(name="fine"), request(**changes)])
    assert not engine.busy


@pytest.mark.parametrize("name", ["page_size", "max_batch", "chunk"])
def test_sizes_out_of_range_are_refused(name):
    with pytest.raises(UsageError, match=f"{name} is 0; it must be at least 1"):
        Engine(MODELS["grouped, dense"], cache_bytes=10**6, **{name: 0})


def test_without_a_budget_the_cache_holds_full_contexts_as_long_as_memory_lasts(monkeypatch):
    model = MODELS["latent, experts"]
    assert Engine(model, max_batch=3).pool.tokens == 3 * 64
    one = bytes_for(model.config, 16, torch.float32)
    monkeypatch.setattr("cadre.infer.engine.free_bytes", lambda device: 10 * one)
    assert Engine(model, max_batch=3).pool.pages == 5


def test_stats_count(engine):
    engine.add(request(range(20), 5))
    engine.add(request(range(3), 4, name="b"))
    engine.step()
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.finished, stats.prompt_tokens) == (2, 0, 0, 23)
    assert (stats.pages_used, stats.pages_total) == (6, 16)
    finishes(engine)
    engine.add(request(range(20), 5))
    finishes(engine)
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.finished, stats.pages_used) == (0, 0, 3, 0)
    assert (stats.prompt_tokens, stats.cached_prompt_tokens, stats.generated_tokens) == (43, 16, 14)
    read = (20 + 4) + (3 + 3) + (4 + 4)
    assert sum(map(sum, stats.expert_load)) == 2 * read  # two experts a token, one sparse layer
    assert len(stats.expert_load[0]) == 6
    assert stats.steps > 5 and stats.step_seconds > 0


def test_clearing_forgets_requests_and_keeps_the_cache(engine):
    engine.add(request(range(20), 5))
    engine.add(request(range(5), 5, name="b"))
    engine.step()
    engine.clear()
    assert not engine.busy
    engine.pool.check([])
    engine.add(request(range(20), 5))
    assert finishes(engine)[0].cached_tokens == 16


def test_the_global_random_state_is_left_alone(engine):
    before = torch.get_rng_state()
    engine.run([request(sampling=Sampling(1.0)), request(name="b", sampling=Sampling(1.0, top_p=0.5, seed=1))])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_multi_token_model_runs_without_its_modules():
    model = lively(small("deepseek_v3", num_nextn_predict_layers=1))
    assert engine_for(model).run([request()])[0][0] == alone(model, request())[0]
