"""The kernels in Triton beside their references, in Triton's interpreter, and compiled for cards that are not there. A program
of its own: Triton asks once, when it is imported, whether it interprets.

    TRITON_INTERPRET=1 python -m tests.card.kernels    how far each result is from the reference's, as JSON
    python -m tests.card.kernels 90                    of each kernel on such a card, as JSON: the instructions that multiply,
                                                       registers of a thread, bytes of them spilled to memory, shared memory
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from cadre.infer import runner
from cadre.infer.engine import Engine, Request
from cadre.infer.pages import bytes_for
from cadre.infer.sampling import Sampling
from cadre.kernels import adamw_triton, fp8_triton, latent_triton, loss_triton, permute_triton, swiglu_triton
from cadre.kernels.adamw import AdamWStep, adamw_reference
from cadre.kernels.fp8 import _GroupedLinear, _Reference
from cadre.kernels.permute import sum_choices_reference
from cadre.kernels.swiglu import swiglu_reference
from cadre.model.attention import LatentAttention
from cadre.model.transformer import Transformer
from tests.shapes import small

CPU = torch.device("cpu")
# Rows of each expert: none, fewer than a tile, exactly one, more; widths that no run divides.
FP8 = {
    "uneven": dict(load=[130, 0, 150, 20], K=160, N=144),
    "even": dict(load=[128, 128], K=128, N=256),
    "few": dict(load=[1, 0, 2], K=16, N=24),
    "none": dict(load=[0, 0], K=32, N=32),
}
# Sizes that a run of float32 may have: some below what a scale reaches.
LEAST, MOST = -40, 20
# How far apart results may be, of their largest size.
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def apart(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest difference between a result and its reference, of the reference's largest size; NaN if either is."""
    pairs = [(one.detach().double().cpu(), other.detach().double().cpu()) for one, other in pairs if other.numel()]
    found = [(one - other).abs().max() / other.abs().max().clamp(min=1e-6) for one, other in pairs]
    return float(torch.stack(found).max()) if found else 0.0


def fp8(load: list[int], K: int, N: int, device: torch.device = CPU) -> list[float]:
    """Of y and the gradients of x and w: the largest difference in a row over the largest size in it."""
    torch.manual_seed(0)
    R, E = sum(load), len(load)
    size_R = torch.linspace(LEAST, MOST, max(R, 1)).exp2()[:R, None]
    x, w, grad, sides = torch.randn(R, K) * size_R, torch.randn(E, N, K), torch.randn(R, N), []
    for products, where in ((_Reference, CPU), (fp8_triton.Products, device)):
        own_x, own_w = (tensor.to(where).requires_grad_() for tensor in (x, w))
        y = _GroupedLinear.apply(own_x, torch.tensor(load, device=where), own_w, products)
        sides.append([side.detach().cpu() for side in (y, *torch.autograd.grad(y, (own_x, own_w), grad.to(where)))])
    pairs = zip(*sides, strict=True)
    return [
        0.0 if not one.numel() else float(((one - other).abs().amax(-1) / one.abs().amax(-1).clamp(min=1e-30)).max())
        for one, other in pairs
    ]


def adamw(counts: list[int], device: torch.device = CPU) -> list[float]:
    """Of weights and moments: the largest relative difference, in which moments may be a last place of bfloat16 apart."""
    sides = []
    for step, where in ((adamw_reference, CPU), (adamw_triton.adamw_on_card, device)):
        random, steps = torch.Generator().manual_seed(0), []
        for count in counts:
            w, g, m, v = (tensor.to(where) for tensor in torch.randn(4, count, generator=random))
            numbers = dict(beta1=0.9, beta2=0.95, eps=1e-8, keep=0.99, rate=-0.1, unbias=1.5)
            steps.append(AdamWStep(w, g, m.bfloat16(), v.square().bfloat16(), **numbers))
        step(steps)
        sides.append([torch.cat([getattr(one, name) for one in steps]).float().cpu() for name in ("weight", "mean", "square")])
    return [float(((one - other).abs() / one.abs().clamp(min=1e-3)).max()) for one, other in zip(*sides, strict=True)]


def latent(H: int, C: int, R: int, P: int, seen: list[int], new: list[int], dtype: torch.dtype, device: torch.device) -> float:
    """Sequences of `seen` positions, the last `new` of which ask, on shuffled pages that hold NaN and infinity elsewhere."""
    random, order = torch.Generator().manual_seed(0), Random(0)
    pages = [-(-count // P) for count in seen]
    free = list(range(sum(pages) + 2))
    order.shuffle(free)
    page_BP = torch.zeros(len(seen), max(pages) + 1, dtype=torch.int32)
    latent_NPC, key_NPR = torch.full((len(free), P, C), torch.nan), torch.full((len(free), P, R), torch.inf)
    q_THC, q_THR = torch.randn(sum(new), H, C, generator=random), torch.randn(sum(new), H, R, generator=random)
    q_THC, q_THR, told, want = q_THC.to(dtype), q_THR.to(dtype), [], []
    for row, (count, asking) in enumerate(zip(seen, new, strict=True)):
        own = [free.pop() for _ in range(pages[row])]
        page_BP[row, : len(own)] = torch.tensor(own)
        at = torch.tensor([own[place // P] * P + place % P for place in range(count)])
        latent_SC, key_SR = (torch.randn(count, width, generator=random).to(dtype).float() for width in (C, R))
        latent_NPC.view(-1, C)[at], key_NPR.view(-1, R)[at] = latent_SC, key_SR
        rows = slice(len(told), len(told) + asking)
        self = SimpleNamespace(scale=(C + R) ** -0.5, heads=H)
        asked = q_THC[None, rows].float(), q_THR[None, rows].float()
        want.append(LatentAttention.attend(self, *asked, latent_SC[None], key_SR[None])[0])
        told += [(row, count - asking + step + 1) for step in range(asking)]
    row_T, seen_T = torch.tensor(told, dtype=torch.int32).T.contiguous()
    parts = (q_THC, q_THR, latent_NPC.to(dtype), key_NPR.to(dtype), page_BP, row_T, seen_T)
    got = latent_triton.latent_decode(*(part.to(device) for part in parts), (C + R) ** -0.5, max(seen))
    return apart([(got, torch.cat(want))])


def loss(N: int, W: int, size: float, dtype: torch.dtype, device: torch.device) -> float:
    """Losses and gradients of logits of such a size, a third of weight zero, in rows that lie apart; and losses alone, by one
    weight for all."""
    random = torch.Generator().manual_seed(0)
    logit_NW = (torch.randn(N, W + 3, generator=random) * size).to(dtype).to(device)[:, :W]
    if W > 4:
        logit_NW[:, 2] = -torch.inf
    target_N = torch.randint(3 if W > 4 else 0, W, (N,), generator=random)
    weight_N = torch.rand(N, generator=random) * (torch.rand(N, generator=random) > 0.3)
    plain = logit_NW.detach().cpu().float().clone().requires_grad_()
    want_N = F.cross_entropy(plain, target_N, reduction="none") * weight_N
    (want_NW,) = torch.autograd.grad(want_N.sum(), plain)
    once = torch.full((1,), 0.5, device=device).expand(N)
    first_N = loss_triton.cross_entropy_on_card(logit_NW, target_N.to(device), once, False)
    got_N = loss_triton.cross_entropy_on_card(logit_NW, target_N.to(device), weight_N.to(device), True)
    half_N = F.cross_entropy(plain, target_N, reduction="none") / 2
    return apart([(got_N, want_N), (logit_NW, want_NW), (first_N, half_N)])


def swiglu(R: int, F: int, dtype: torch.dtype, device: torch.device) -> float:
    random = torch.Generator().manual_seed(0)
    gate_up, grad = (6 * torch.randn(R, 2 * F, generator=random)).to(dtype), torch.randn(R, F, generator=random).to(dtype)
    plain = gate_up.float().requires_grad_()
    want = swiglu_reference(*plain.chunk(2, dim=-1))
    (want_grad,) = torch.autograd.grad(want, plain, grad.float())
    got = swiglu_triton.swiglu_on_card(gate_up.to(device))
    got_grad = swiglu_triton.swiglu_gradient_on_card(gate_up.to(device), grad.to(device))
    return apart([(got, want), (got_grad, want_grad)])


def choices(T: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> float:
    """The gradients of rows and weights of `sum_choices`."""
    random = torch.Generator().manual_seed(0)
    row_TK = torch.randperm(T * K, generator=random).view(T, K)
    y, grad = (torch.randn(count, D, generator=random).to(dtype) for count in (T * K, T))
    weight = torch.rand(T, K, generator=random).to(dtype).float()
    plain_y, plain_w = y.float().requires_grad_(), weight.clone().requires_grad_()
    out = sum_choices_reference(plain_y, plain_w, row_TK, torch.empty(0))
    want = torch.autograd.grad(out, (plain_y, plain_w), grad.float())
    parts = (part.to(device) for part in (grad, y, weight, row_TK))
    return apart(list(zip(permute_triton.sum_choices_gradient_on_card(*parts), want, strict=True)))


def some(random: Random, **ranges: tuple[int, int]) -> dict[str, int]:
    return {name: random.randint(*ends) for name, ends in ranges.items()}


def cases(widest: bool = False) -> dict[str, tuple]:
    """By name a check and its arguments: shapes by hand, then drawn ones. `widest`: also those too large to interpret."""
    random, found = Random(1), []
    found += [(loss, dict(N=N, W=W, size=s)) for N, W, s in ((0, 9, 1), (3, 1, 1), (2, 4096, 30), (2, 4097, 1), (2, 129280, 5))]
    found += [(loss, dict(**some(random, N=(1, 5), W=(5, 9000)), size=random.choice([0.1, 300]))) for _ in range(6)]
    found += [(swiglu, dict(R=R, F=F)) for R, F in ((0, 8), (1, 1), (3, 1024), (5, 1025))]
    found += [(swiglu, some(random, R=(1, 9), F=(1, 700))) for _ in range(4)]
    found += [(choices, dict(T=T, K=K, D=D)) for T, K, D in ((0, 2, 8), (1, 1, 1), (3, 2, 1024), (2, 8, 2500))]
    found += [(choices, some(random, T=(1, 9), K=(1, 6), D=(1, 300))) for _ in range(4)]
    hand = dict(H=16, C=64, R=16, P=16)
    found += [(latent, dict(**hand, seen=[1], new=[1])), (latent, dict(**hand, seen=[64, 32, 300, 33], new=[1, 1, 3, 2]))]
    found += [(latent, dict(H=3, C=24, R=6, P=4, seen=[70, 2], new=[2, 2])), (latent, dict(**hand, seen=[2000], new=[1]))]
    for _ in range(6):
        seen = [random.randint(1, 100) for _ in range(random.randint(1, 3))]
        new = [random.randint(1, min(2, count)) for count in seen]
        found.append((latent, dict(**some(random, H=(1, 33), C=(1, 70), R=(1, 20), P=(1, 9)), seen=seen, new=new)))
    if widest:
        v3 = dict(H=128, C=512, R=64, P=16)
        found += [
            (latent, dict(**v3, seen=[40_000], new=[1])),
            (latent, dict(**v3, seen=[4000, 17, 900] * 20, new=[1, 2, 1] * 20)),
        ]
        found += [(loss, dict(N=500, W=129280, size=3)), (swiglu, dict(R=9000, F=2048)), (choices, dict(T=1000, K=8, D=7168))]
    return {f"{check.__name__} {arguments}": (check, arguments) for check, arguments in found}


def engine(speculate: int) -> list[bool]:
    """Whether greedy requests get the same tokens through the kernel as through torch, and whether it was asked."""
    model = Transformer(small("deepseek_v3", num_nextn_predict_layers=1, initializer_range=0.3)).initialize(3)
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(31, (length,), generator=random).tolist() for length in (1, 30, 7)]
    kernel = mock.Mock(wraps=latent_triton.latent_decode)
    found = []
    for takes in (False, True):
        with (
            mock.patch.object(runner.NativeModel, "build", return_value=None),
            mock.patch.object(runner, "_takes", return_value=takes),
            mock.patch.object(latent_triton, "latent_decode", kernel),
        ):
            size = 20 * bytes_for(model.config, 4, torch.float32, 4)
            made = Engine(model, cache_bytes=size, page_size=4, max_batch=2, speculate=speculate)
            sampling = Sampling(0.0)
            found.append(made.run([Request(str(n), tuple(ids), 4, sampling, ignore_eos=True) for n, ids in enumerate(prompts)]))
    return [found[0] == found[1], kernel.called]


NUMBERS, HALVES, NARROW, PLACES, LONG, COUNT, FACTOR = "*fp32", "*bf16", "*fp8e4nv", "*i32", "*i64", "i32", "fp32"
WIDTH = "i32:16"  # a multiple of 16, as widths of models are
ROWS = dict(x=NARROW, x_scale=NUMBERS, w=NARROW, w_scale=NUMBERS, first=PLACES, stop=PLACES, experts=PLACES, out=HALVES)
SIZES = dict(N=WIDTH, K=WIDTH, runs_n=COUNT, runs_k=COUNT)
ADAMW = dict(weight=NUMBERS, gradient=NUMBERS, mean=HALVES, square=HALVES, count=COUNT)
RUN, PART, WIDE = dict(RUN=fp8_triton.RUN), dict(PART=fp8_triton._PART), dict(num_warps=fp8_triton._WARPS)
MULTIPLY = {name: value for name, value in fp8_triton._launch().items() if name != "PART"}
# DeepSeek-V3's widths, and pages as the engine has them.
LATENT = dict(C=512, R=64, P=16, BH=latent_triton.HEADS, BS=latent_triton.POSITIONS, BC=512, BR=64)
WORDS = loss_triton.launch(129280)
# Of each kernel: where it is, its arguments, constants, and how it is launched.
KERNELS = {
    "_step": (adamw_triton, {**ADAMW, **dict.fromkeys(("beta1", "beta2", "eps", "keep", "rate", "unbias"), FACTOR)},
              dict(BLOCK=adamw_triton.BLOCK), dict(num_warps=8)),
    "_round_rows": (fp8_triton, dict(x=HALVES, rounded=NARROW, scale=NUMBERS, R=COUNT, K=WIDTH, runs=COUNT), RUN, WIDE),
    "_round_turned": (fp8_triton, dict(x=HALVES, rounded=NARROW, scale=NUMBERS, first=PLACES, stop=PLACES, C=WIDTH,
                                       tiles=COUNT), RUN, WIDE),
    "_round_blocks": (fp8_triton, dict(w=NUMBERS, rounded=NARROW, turned=NARROW, scale=NUMBERS, **SIZES), RUN, WIDE),
    "_multiply_rows": (fp8_triton, {**ROWS, **SIZES}, RUN | PART, MULTIPLY),
    "_multiply_turned": (fp8_triton, dict(y=NARROW, y_scale=NUMBERS, x=NARROW, x_scale=NUMBERS, tile_of=PLACES, out=NUMBERS,
                                          N=WIDTH, K=WIDTH, tiles=COUNT), RUN | PART, MULTIPLY),
    "_attend": (latent_triton, dict(q=HALVES, qr=HALVES, latent=HALVES, key=HALVES, pages=PLACES, row=PLACES, seen=PLACES,
                                    average=NUMBERS, lse=NUMBERS, scale=FACTOR, H=COUNT, pages_stride=COUNT, parts=COUNT),
                LATENT, latent_triton.LAUNCH),
    "_join": (latent_triton, dict(average=NUMBERS, lse=NUMBERS, out=HALVES, parts=COUNT),
              dict(C=512, BI=latent_triton.JOINED, BC=512), dict(num_warps=4)),
    "_cross_entropy": (loss_triton, dict(logit=HALVES, target=LONG, weight=NUMBERS, loss=NUMBERS, stride=WIDTH,
                                         weight_stride=COUNT, W=WIDTH),
                       dict(GRAD=True, BLOCK=WORDS["BLOCK"]), dict(num_warps=WORDS["num_warps"])),
    "_forward": (swiglu_triton, dict(gate_up=HALVES, out=HALVES, count=WIDTH, F=WIDTH), dict(BLOCK=swiglu_triton.BLOCK), {}),
    "_backward": (swiglu_triton, dict(gate_up=HALVES, grad=HALVES, out=HALVES, count=WIDTH, F=WIDTH),
                  dict(BLOCK=swiglu_triton.BLOCK), {}),
    "_choice": (permute_triton, dict(grad=HALVES, y=HALVES, weight=NUMBERS, rows=LONG, grad_y=HALVES, grad_weight=NUMBERS,
                                     K=COUNT, D=WIDTH), dict(BLOCK=permute_triton.BLOCK), {}),
}  # fmt: skip


def compiled(capability: int) -> dict[str, dict]:
    """Every kernel compiled for a card, its tensors beginning at multiples of 16 bytes, as torch lays them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for name, (of, signature, constants, options) in KERNELS.items():
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, kind in enumerate(signature.values())
            if kind[0] == "*" or ":" in kind
        }
        kinds = {argument: kind.partition(":")[0] for argument, kind in signature.items()}
        source = ASTSource(getattr(of, name), {**kinds, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        multiplying = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\S*", made.asm["ptx"])))
        found[name] = dict(multiplying=multiplying, shared=made.metadata.shared, **registers(made.asm["cubin"]))
    return found


def registers(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of what found no room in them."""
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(Path(nvidia.__file__).parent / "bin" / "cuobjdump"), "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.findall(rf"{key}:(\d+)", told)[0]) for name, key in (("registers", "REG"), ("spilled", "STACK"))}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(compiled(int(sys.argv[1]))))
    else:
        told: dict = {name: fp8(**case) for name, case in FP8.items()}
        told["adamw"] = adamw([1, 4096, 5000, 0])
        for dtype in (torch.float32, torch.float16):  # the interpreter of Triton 3.6 multiplies bfloat16 wrongly
            for name, (check, arguments) in cases().items():
                told[f"{dtype} {name}"] = check(**arguments, dtype=dtype, device=CPU) / LIMITS[dtype]
        told["engine"] = [engine(speculate) for speculate in (0, 1)]
        print(json.dumps(told))
