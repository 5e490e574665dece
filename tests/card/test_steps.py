"""What a machine without a card can say of training on one: no operation mixes devices, and none makes Python wait for a
result before the step's end, which would leave the card idle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.card.steps import CASES

ROOT = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    command = [sys.executable, "-m", "tests.card.steps"]
    if not torch.backends.cuda.is_built():
        library = tmp_path_factory.mktemp("card") / "no_card.so"
        lib = str(ROOT / "lib")
        flags = ["-std=c++20", "-shared", "-fPIC", "-w", f"-I{ROOT / 'include'}", f"-L{lib}", f"-Wl,-rpath,{lib}"]
        source = str(Path(__file__).parent / "no_card.cpp")
        subprocess.run(["g++", *flags, source, "-o", str(library), "-lc10", "-ltorch_cpu"], check=True)
        command.append(str(library))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.skipif(
    torch.backends.cuda.is_built() and not torch.cuda.is_available(),
    reason="torch was built for CUDA and finds no card: its own hooks stand where a stand-in's would",
)
@pytest.mark.parametrize("case", CASES)
def test_a_step_stays_on_the_card(case: str, outcome: dict[str, str | None]) -> None:
    assert outcome[case] is None
