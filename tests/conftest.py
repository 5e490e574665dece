"""Settings for the whole suite, and a user to whom files can be closed."""

import os
import shutil
import tempfile
from pathlib import Path

# What the tests hold results to is what a CPU gives, bit for bit at times; programs they start inherit this. CADRE_TEST_CARD=1:
# tests/card meets a real one.
if os.environ.get("CADRE_TEST_CARD") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# The suite runs on two cores, several tests at once at times, and its operations are tiny: threads would cost more in
# handing over than they save, and one thread sums in one order. Programs that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# derandomize: a failure anywhere fails everywhere. deadline: a shared machine's pauses are no failures.
settings.register_profile("cadre", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("cadre")


@pytest.fixture
def nobodys_folder():
    """An empty folder of a user without root's rights, whose rights the test has."""
    folder, before = Path(tempfile.mkdtemp(prefix="cadre-")), os.geteuid()
    if before == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(before)
        folder.chmod(0o700)
        for where, folders, _ in os.walk(folder):
            for name in folders:
                Path(where, name).chmod(0o700)
        shutil.rmtree(folder)
