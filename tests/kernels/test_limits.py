import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from cadre.kernels import limits
from cadre.kernels.limits import best_dtype, gemm_flops_per_second, memory_bytes_per_second, peak_memory_bytes

CPU = torch.device("cpu")


def test_gemm_rate_counts_a_multiply_and_an_add_as_two(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            self.now += 0.5
            return self.now

    monkeypatch.setattr(limits, "time", Clock())
    assert gemm_flops_per_second(torch.float32, CPU, size=64, repeats=3) == 2 * 64**3 / 0.5


@pytest.mark.parametrize("rate, size", [(1e9, 256), (1e11, 2048)])
def test_a_product_that_is_emulated_is_timed_small(monkeypatch, rate, size):
    timed = []

    def measure(ways, dtype, device, size, repeats):
        timed.append(size)
        return rate

    monkeypatch.setattr(limits, "_rate", measure)
    gemm_flops_per_second(torch.bfloat16, CPU)
    assert timed[-1] == size
    gemm_flops_per_second(torch.float32, CPU)
    assert timed[-1] == 2048


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


def test_memory_rate_counts_what_is_read_and_what_is_written(monkeypatch):
    class Clock:
        ticks = iter([0, 9, 10, 12, 20, 23])

        def perf_counter(self):
            return next(self.ticks)

    monkeypatch.setattr(limits, "time", Clock())
    assert memory_bytes_per_second(CPU, size=4096, repeats=3) == 2 * 4096 / 2


def test_memory_rate_is_that_of_a_pass_timed_from_outside():
    rate = memory_bytes_per_second(CPU, size=2**25)
    block, best = torch.ones(2**23), float("inf")
    for _ in range(9):
        start = time.perf_counter()
        block.neg_()
        best = min(best, time.perf_counter() - start)
    assert rate < 4 * 2 * block.nbytes / best


def test_peak_memory_is_in_bytes_and_covers_what_is_held():
    held = torch.ones(16 * 2**20)
    now = psutil.Process().memory_info().rss
    assert now > held.numel() * 4
    assert 0.98 * now < peak_memory_bytes(CPU) < psutil.virtual_memory().total


def test_peak_memory_is_this_process_own_not_that_of_the_one_that_started_it():
    held = torch.ones(200 * 2**20)
    program = "import torch; from cadre.kernels.limits import peak_memory_bytes; print(peak_memory_bytes(torch.device('cpu')))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 50 * 2**20 < int(shown.stdout) < held.nbytes < peak_memory_bytes(CPU)


@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])  # getrusage(2) of either
@pytest.mark.parametrize("status", [None, "VmRSS:\t 5 kB\n"])
def test_peak_memory_where_the_kernel_keeps_no_high_water_mark(monkeypatch, tmp_path, platform, unit, status):
    path = tmp_path / "status"
    if status is not None:
        path.write_text(status)
    monkeypatch.setattr(limits, "_STATUS", path)
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=7))
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_memory_bytes(CPU) == 7 * unit


def test_the_rate_of_reading_is_positive_and_finite() -> None:
    from cadre.kernels.limits import read_bytes_per_second

    assert 1e7 < read_bytes_per_second(torch.device("cpu"), size=2**20, repeats=2) < 1e14
