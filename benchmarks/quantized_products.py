"""One product of few rows with a large matrix, by torch's kernels, torchao's (if installed) and ours: milliseconds each.

python benchmarks/quantized_products.py
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable

import torch

from cadre.kernels.native.library import library, why_missing
from cadre.kernels.native.structs import Keeper
from cadre.kernels.quantized import quantize

OUT, IN = 16384, 1024


def milliseconds(product: Callable[[], object]) -> float:
    times = []
    for _ in range(18):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:]) * 1e3


def products(rows: int) -> dict[str, Callable[[], object]]:
    x, weight = torch.randn(rows, IN), torch.randn(OUT, IN)
    narrow_x, narrow = x.bfloat16(), weight.bfloat16()
    packed8, scale8 = torch.randint(-127, 127, (OUT, IN), dtype=torch.int8), torch.rand(OUT).bfloat16()
    packed4 = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 15, (OUT, IN), dtype=torch.int32), 1)
    scale4 = torch.rand(IN // 32, OUT, 2).bfloat16()
    found: dict[str, Callable[[], object]] = {
        "torch, bf16 weights": lambda: narrow_x @ narrow.T,
        "torch, float32 weights": lambda: x @ weight.T,
        "torch._weight_int8pack_mm": lambda: torch._weight_int8pack_mm(narrow_x, packed8, scale8),
        "torch._weight_int4pack_mm_for_cpu": lambda: torch._weight_int4pack_mm_for_cpu(narrow_x, packed4, 32, scale4),
    }
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        pass
    else:
        model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16))
        quantize_(model, Int8WeightOnlyConfig())
        found["torchao, int8 weights only"] = lambda: model(narrow_x)
    native = library()
    if native is None:
        print(f"ours left out: {why_missing()}")
        return found
    y = torch.empty(rows, OUT)
    for name, kept in (("bf16", narrow), ("int8", quantize(weight, 8)), ("int4", quantize(weight, 4))):
        keeper = Keeper()
        matrix = keeper.matrix(kept)

        def ours(matrix: ctypes.Structure = matrix, keeper: Keeper = keeper) -> None:
            native.cadre_linear(ctypes.byref(matrix), x.data_ptr(), rows, torch.get_num_threads(), y.data_ptr())

        found[f"ours, {name}"] = ours
    return found


@torch.inference_mode()
def main() -> None:
    timed = {rows: {name: milliseconds(product) for name, product in products(rows).items()} for rows in (1, 32)}
    print(f"{'weights ' + str(OUT) + ' x ' + str(IN):36s}   1 row  32 rows   (ms)")
    for name in timed[1]:
        print(f"{name:36s} {timed[1][name]:7.2f} {timed[32][name]:8.2f}")


if __name__ == "__main__":
    main()
