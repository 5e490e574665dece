"""Kernels in Triton, without a card: what they compute, in Triton's interpreter, and that they compile for real ones."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: make test installs it", allow_module_level=True)

from tests.card.kernels import FP8, cases


def run(*arguments: str, **environment: str) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "tests.card.kernels", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def distances() -> dict[str, list[float]]:
    return run(TRITON_INTERPRET="1")


@pytest.mark.parametrize("case", FP8)
def test_the_products_are_the_references(case: str, distances: dict[str, list[float]]) -> None:
    """Rounded alike to the bit, they differ by the order of float32 sums alone."""
    assert max(distances[case]) < 1e-6


def test_adamw_is_the_references(distances: dict[str, list[float]]) -> None:
    weight, *moments = distances["adamw"]
    assert weight < 1e-5 and max(moments) < 2**-7


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.float16"])
@pytest.mark.parametrize("case", cases())
def test_they_are_their_references(case: str, dtype: str, distances: dict[str, float]) -> None:
    """In units of what they may be apart."""
    assert distances[f"{dtype} {case}"] < 1


def test_greedy_requests_get_the_same_tokens_through_the_kernel(distances: dict[str, list[list[bool]]]) -> None:
    """With drafts and without."""
    assert distances["engine"] == [[True, True], [True, True]]


@pytest.mark.parametrize("capability, instruction", [(89, "mma.sync.aligned"), (90, "wgmma.mma_async.sync.aligned")])
def test_they_compile(capability: int, instruction: str) -> None:
    """For Ada and Hopper: experts to products of FP8, attention of few heads to those of bfloat16, and within registers."""
    found = run(str(capability))
    for name, made in found.items():
        narrow = name.startswith("_multiply")
        assert bool(made["multiplying"]) == (narrow or name == "_attend")
        if narrow:
            assert all(one.startswith(instruction) and "e4m3.e4m3" in one for one in made["multiplying"])
        elif made["multiplying"]:
            assert all("bf16.bf16" in one for one in made["multiplying"])
    spilled = {name: made["spilled"] for name, made in found.items() if made["spilled"]}
    # On Ada products of FP8 take all registers and a few bytes more.
    assert all(capability < 90 and name.startswith("_multiply") and spilled[name] <= 64 for name in spilled), spilled
