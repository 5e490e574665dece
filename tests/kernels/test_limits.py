import sys
import time
from pathlib import Path

import pytest
import torch

from cadre.kernels import limits
from cadre.kernels.limits import best_dtype, gemm_flops_per_second, peak_memory_bytes

CPU = torch.device("cpu")


def test_gemm_rate_counts_a_multiply_and_an_add_as_two(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            self.now += 0.5
            return self.now

    monkeypatch.setattr(limits, "time", Clock())
    assert gemm_flops_per_second(torch.float32, CPU, size=64, repeats=3) == 2 * 64**3 / 0.5


def test_gemm_rate_is_that_of_a_product_timed_from_outside():
    rate = gemm_flops_per_second(torch.float32, CPU, size=512, repeats=9)
    a = torch.randn(512, 512)
    best = float("inf")
    for _ in range(9):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    assert rate < 4 * 2 * 512**3 / best


@pytest.mark.parametrize("ratio, expected", [(5.0, torch.bfloat16), (1.0, torch.float32), (0.2, torch.float32)])
def test_bfloat16_is_chosen_only_where_it_is_faster(monkeypatch, ratio, expected):
    def rate(dtype, *_):
        return ratio if dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(limits, "gemm_flops_per_second", rate)
    assert best_dtype(CPU) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own account is in /proc")
def test_peak_memory_is_the_kernels_account_of_it_in_bytes():
    torch.ones(16 * 2**20)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert peak_memory_bytes(CPU) == pytest.approx(int(lines["VmHWM"].split()[0]) * 1024, rel=0.02)
