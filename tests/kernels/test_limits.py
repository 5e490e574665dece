import sys
import time
from types import SimpleNamespace

import psutil
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


@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])  # getrusage(2) of either
def test_peak_memory_is_in_bytes_and_covers_what_is_held(monkeypatch, platform, unit):
    held = torch.ones(16 * 2**20)
    now = psutil.Process().memory_info().rss
    assert now > held.numel() * 4
    assert 0.98 * now < peak_memory_bytes(CPU) < psutil.virtual_memory().total
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=7))
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_memory_bytes(CPU) == 7 * unit
