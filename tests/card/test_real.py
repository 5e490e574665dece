"""What only a card can say, and nobody has asked one yet: every kernel in Triton there, torch's attention as we call it, a
training step and the engine, beside what a CPU computes in float32.

    CADRE_TEST_CARD=1 python -m pytest tests/card
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which torch's builds for CUDA bring along", allow_module_level=True)

from torch import Tensor

from cadre.infer.engine import Engine, Request
from cadre.infer.pages import bytes_for
from cadre.infer.sampling import Sampling
from cadre.kernels.attention import causal_attention, causal_attention_reference
from cadre.kernels.card import launches, multiplies_fp8
from cadre.kernels.loss import linear_cross_entropy, linear_cross_entropy_reference
from cadre.kernels.permute import sort_choices, sort_choices_reference
from cadre.model.transformer import Transformer
from cadre.train.balance import Balance
from cadre.train.bench.step import TrainingStep
from cadre.train.objective import MicroBatch, losses
from cadre.train.recipe import BalanceSection
from tests.card.kernels import FP8, LIMITS, adamw, apart, cases, fp8
from tests.card.steps import V3, WIDE
from tests.shapes import FAMILIES, small

# Where there is none the tests that need no kernel of it run on the CPU, so that they keep up with what they call.
CARD = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
needs_card = pytest.mark.skipif(CARD.type == "cpu", reason="needs a card, and CADRE_TEST_CARD=1")
HALVES = torch.bfloat16
KERNELS = cases(widest=True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_card
def test_kernels_are_launched() -> None:
    assert launches(torch.ones(1, device=CARD))


@needs_card
@pytest.mark.parametrize(("case", "dtype"), [
    (case, dtype) for case in KERNELS for dtype in (torch.bfloat16, torch.float16, torch.float32)
    if dtype != torch.float32 or KERNELS[case][1].get("C", 0) <= 128  # wide latents are taken in 16 bits only: runner._takes
])  # fmt: skip
def test_they_are_their_references(case: str, dtype: torch.dtype) -> None:
    check, arguments = KERNELS[case]
    assert check(**arguments, dtype=dtype, device=CARD) < LIMITS[dtype]


@needs_card
@pytest.mark.parametrize("case", FP8)
def test_products_of_fp8_are_the_references(case: str) -> None:
    if not multiplies_fp8(CARD):
        pytest.skip("this card does not multiply FP8")
    # Runs of 128 are summed within the tensor core, whose sums keep 14 bits.
    assert max(fp8(**FP8[case], device=CARD)) < 2**-11


@needs_card
def test_adamw_is_the_references() -> None:
    weight, *moments = adamw([1, 4096, 5000, 0], CARD)
    assert weight < 1e-5 and max(moments) < 2**-7


@pytest.mark.parametrize("experts", [7, 256, 300])
def test_choices_are_sorted_as_the_reference_sorts_them(experts: int) -> None:
    expert_TK = torch.randint(experts, (1000, 3), generator=torch.Generator().manual_seed(0))
    for one, other in zip(sort_choices(expert_TK.to(CARD), experts), sort_choices_reference(expert_TK, experts), strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("keeps", [True, False])
def test_the_loss_and_its_gradients(keeps: bool) -> None:
    hidden, head = random(300, 64).to(HALVES), random(1000, 64, seed=1)
    target, weight = torch.arange(300) * 3, torch.arange(300).remainder(4).float()
    sides = []
    for function, dtype, where in (
        (linear_cross_entropy, HALVES, CARD), (linear_cross_entropy_reference, torch.float32, torch.device("cpu")),
    ):  # fmt: skip
        parts = [x.to(where, kind).requires_grad_(keeps) for x, kind in ((hidden, dtype), (head.to(HALVES), torch.float32))]
        total = function(*parts, target.to(where), weight.to(where))
        sides.append((total, *(torch.autograd.grad(total, parts) if keeps else ())))
    assert apart(list(zip(*sides, strict=True))) < 2e-2


@needs_card
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("heads, groups, K, V", [(16, 16, 192, 128), (4, 4, 24, 16), (8, 2, 64, 64), (8, 1, 128, 128)])
@pytest.mark.parametrize("T, S", [(704, 704), (130, 130), (7, 300), (1, 40)])  # 704: where cuDNN gave NaN
def test_attention(T: int, S: int, heads: int, groups: int, K: int, V: int, grads: bool, documents: bool) -> None:
    shapes = (2, T, heads, K), (2, S, groups, K), (2, S, groups, V)
    parts = [random(*shape, seed=seed).to(HALVES) for seed, shape in enumerate(shapes)]
    document_BS = (torch.arange(S) // 50).expand(2, S) if documents else None
    up, sides = random(2, T, heads, V, seed=9), []
    for function, dtype, where in (
        (causal_attention, HALVES, CARD), (causal_attention_reference, torch.float32, torch.device("cpu")),
    ):  # fmt: skip
        own = [part.to(where, dtype).requires_grad_(grads) for part in parts]
        with torch.set_grad_enabled(grads):
            out = function(*own, K**-0.5, None if document_BS is None else document_BS.to(where))
        sides.append((out, *(torch.autograd.grad(out, own, up.to(where, dtype)) if grads else ())))
    assert apart(list(zip(*sides, strict=True))) < 3e-2


@pytest.mark.parametrize(
    "config",
    [V3, small("glm4_moe", **WIDE), small("qwen3_moe", **WIDE), small("llama", hidden_size=32)],
    ids=lambda config: config.model_type,
)
def test_a_step_is_what_a_cpu_makes_of_it_in_float32(config) -> None:
    """The loss, and of every matrix the direction of its gradient: of few tokens one that goes to another expert counts."""
    ids_BT = torch.randint(config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    sides = []
    for dtype, where in ((HALVES, CARD), (torch.float32, torch.device("cpu"))):
        model = Transformer(config).initialize(0).to(where).train()
        model.compute_in(dtype)
        balance = Balance(model, BalanceSection())
        balance.reset()
        total = losses(model, MicroBatch(ids_BT.to(where)), balance, mtp_weight=0.3).total
        total.backward()
        sides.append((total.item(), {name: w.grad.float().cpu().flatten() for name, w in model.named_parameters()}))
    (got, got_grads), (want, want_grads) = sides
    assert got == pytest.approx(want, rel=1e-2)
    for name, grad in want_grads.items():
        assert torch.cosine_similarity(got_grads[name], grad, dim=0) > 0.9, name


@pytest.mark.parametrize("fp8_experts", [False, True])
def test_steps_of_the_benchmark_are_finite(fp8_experts: bool) -> None:
    if fp8_experts and not multiplies_fp8(CARD):
        pytest.skip("this card does not multiply FP8")
    step = TrainingStep(V3, batch=2, seq_len=24, dtype=HALVES, device=CARD, fp8_experts=fp8_experts)
    assert step() > 0 and step() > 0
    assert all(weight.isfinite().all() for weight in step.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("speculate", [0, 1])
def test_the_engine_gives_probable_tokens(family: str, speculate: int) -> None:
    """Each token's log-probability is about what a plain pass in float32 on the CPU gives it."""
    more = dict(num_nextn_predict_layers=1) if family == "deepseek_v3" else {}
    if speculate and not more:
        pytest.skip("no modules to draft with")
    model = Transformer(small(family, **more, initializer_range=0.1)).initialize(0).to(HALVES).eval()
    prompts = [torch.randint(31, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (1, 20, 9)]
    requests = [
        Request(str(n), tuple(ids), 9, Sampling(0.0, logprobs=1), ignore_eos=True) for n, ids in enumerate(prompts)
    ]  # fmt: skip
    plain = Transformer(model.config).eval()
    plain.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    on_card = model.to(CARD)
    made = Engine(
        on_card, cache_bytes=40 * bytes_for(model.config, 4, HALVES, 4), page_size=4, max_batch=2, speculate=speculate
    )
    for request in requests:
        made.add(request)
    tokens: dict[str, list] = {request.id: [] for request in requests}
    while made.busy:
        for output in made.step():
            tokens[output.id] += output.tokens
    for request in requests:
        found, prompt = tokens[request.id], list(request.prompt_ids)
        assert len(found) == 9
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + [token.id for token in found]]))[0].log_softmax(-1)
        for step, token in enumerate(found):
            assert token.logprob == pytest.approx(float(logits[len(prompt) + step - 1, token.id]), abs=0.1)
