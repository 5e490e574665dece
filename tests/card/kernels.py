"""The kernels in Triton beside their references, in Triton's interpreter, and compiled for cards that are not there. A program
of its own: Triton asks once, when it is imported, whether it interprets.

    TRITON_INTERPRET=1 python -m tests.card.kernels    how far each result is from the reference's, as JSON
    python -m tests.card.kernels 90                    the instructions that multiply, on such a card, as JSON
"""

from __future__ import annotations

import json
import re
import sys

import torch

from cadre.kernels import adamw_triton, fp8_triton
from cadre.kernels.adamw import AdamWStep, adamw_reference
from cadre.kernels.fp8 import _GroupedLinear, _Reference

# Rows of each expert: none, fewer than a tile, exactly one, more; widths that no run divides.
CASES = {
    "uneven": dict(load=[130, 0, 150, 20], K=160, N=144),
    "even": dict(load=[128, 128], K=128, N=256),
    "few": dict(load=[1, 0, 2], K=16, N=24),
    "none": dict(load=[0, 0], K=32, N=32),
}
# Sizes that a run of float32 may have: some below what a scale reaches.
LEAST, MOST = -40, 20


def distance(load: list[int], K: int, N: int) -> list[float]:
    """Of y and the gradients of x and w: the largest difference in a row over the largest size in it."""
    torch.manual_seed(0)
    R, E = sum(load), len(load)
    size_R = torch.linspace(LEAST, MOST, max(R, 1)).exp2()[:R, None]
    x, w = (torch.randn(R, K) * size_R).requires_grad_(), torch.randn(E, N, K).requires_grad_()
    grad, sides = torch.randn(R, N), []
    for products in (_Reference, fp8_triton.Products):
        y = _GroupedLinear.apply(x, torch.tensor(load), w, products)
        sides.append((y, *torch.autograd.grad(y, (x, w), grad)))
    pairs = zip(*sides, strict=True)
    return [
        0.0 if not one.numel() else float(((one - other).abs().amax(-1) / one.abs().amax(-1).clamp(min=1e-30)).max())
        for one, other in pairs
    ]


def adamw_distance(counts: list[int]) -> list[float]:
    """Of weights and moments: the largest relative difference, in which moments may be a last place of bfloat16 apart."""
    sides = []
    for step in (adamw_reference, adamw_triton.adamw_on_card):
        random, steps = torch.Generator().manual_seed(0), []
        for count in counts:
            w, g, m, v = torch.randn(4, count, generator=random)
            numbers = dict(beta1=0.9, beta2=0.95, eps=1e-8, keep=0.99, rate=-0.1, unbias=1.5)
            steps.append(AdamWStep(w, g, m.bfloat16(), v.square().bfloat16(), **numbers))
        step(steps)
        sides.append([torch.cat([getattr(one, name) for one in steps]).float() for name in ("weight", "mean", "square")])
    return [float(((one - other).abs() / one.abs().clamp(min=1e-3)).max()) for one, other in zip(*sides, strict=True)]


NUMBERS, HALVES, NARROW, PLACES, COUNT, FACTOR = "*fp32", "*bf16", "*fp8e4nv", "*i32", "i32", "fp32"
ROWS = dict(x=NARROW, x_scale=NUMBERS, w=NARROW, w_scale=NUMBERS, first=PLACES, stop=PLACES, experts=PLACES, out=HALVES)
SIZES = dict(N=COUNT, K=COUNT, runs_n=COUNT, runs_k=COUNT)
ADAMW = dict(weight=NUMBERS, gradient=NUMBERS, mean=HALVES, square=HALVES, count=COUNT)
SIGNATURES = {
    "_step": {**ADAMW, **dict.fromkeys(("beta1", "beta2", "eps", "keep", "rate", "unbias"), FACTOR)},
    "_round_rows": dict(x=HALVES, rounded=NARROW, scale=NUMBERS, R=COUNT, K=COUNT, runs=COUNT),
    "_round_turned": dict(x=HALVES, rounded=NARROW, scale=NUMBERS, first=PLACES, stop=PLACES, C=COUNT, tiles=COUNT),
    "_round_blocks": dict(w=NUMBERS, rounded=NARROW, turned=NARROW, scale=NUMBERS, **SIZES),
    "_multiply_rows": {**ROWS, **SIZES},
    "_multiply_turned": dict(
        y=NARROW, y_scale=NUMBERS, x=NARROW, x_scale=NUMBERS, tile_of=PLACES, out=NUMBERS, N=COUNT, K=COUNT, tiles=COUNT
    ),
}  # fmt: skip


def instructions(capability: int) -> dict[str, list[str]]:
    """Compile every kernel for a card; which matrix instructions each has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for name, signature in SIGNATURES.items():
        of, block = (adamw_triton, "BLOCK") if name == "_step" else (fp8_triton, "RUN")
        launch = fp8_triton._launch()
        constants = {block: getattr(of, block), "PART": launch.pop("PART")}
        if not name.startswith("_multiply"):
            del constants["PART"]
        source = ASTSource(getattr(of, name), {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
        assert made.asm["cubin"]
        found[name] = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\S*", made.asm["ptx"])))
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(instructions(int(sys.argv[1]))))
    else:
        found = {name: distance(**case) for name, case in CASES.items()}
        print(json.dumps({**found, "adamw": adamw_distance([1, 4096, 5000, 0])}))
