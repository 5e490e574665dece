"""Kernels in Triton, without a card: what they compute, in Triton's interpreter, and that they compile for real ones."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.card.kernels import CASES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: make test installs it")


def run(*arguments: str, **environment: str) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "tests.card.kernels", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def distances() -> dict[str, list[float]]:
    return run(TRITON_INTERPRET="1")


@pytest.mark.parametrize("case", CASES)
def test_the_products_are_the_references(case: str, distances: dict[str, list[float]]) -> None:
    """Rounded alike to the bit, they differ by the order of float32 sums alone."""
    assert max(distances[case]) < 1e-6


def test_adamw_is_the_references(distances: dict[str, list[float]]) -> None:
    weight, *moments = distances["adamw"]
    assert weight < 1e-5 and max(moments) < 2**-7


@pytest.mark.parametrize("capability, instruction", [(89, "mma.sync.aligned"), (90, "wgmma.mma_async.sync.aligned")])
def test_they_compile_to_products_of_fp8(capability: int, instruction: str) -> None:
    """For Ada and Hopper."""
    found = run(str(capability))
    for name in ("_multiply_rows", "_multiply_turned"):
        assert found[name]
        assert all(one.startswith(instruction) and "e4m3.e4m3" in one for one in found[name])
    assert not any(found[name] for name in found if not name.startswith("_multiply"))
