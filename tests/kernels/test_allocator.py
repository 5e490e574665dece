import subprocess
import sys

from cadre.kernels import allocator
from cadre.kernels.allocator import keep_freed_memory

# Page faults of filling a block of 64 MB again and again, in a process of its own: the switch lasts as long as its process.
FAULTS = """
import resource, sys, torch
from cadre.kernels.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def fill():
    torch.empty(16 * 2**20).fill_(1)
for _ in range(16):  # glibc sets aside up to seven odd ends of aligned blocks before it joins them
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_blocks_are_used_again_without_asking_the_kernel():
    if sys.platform == "linux":
        assert faults("keep") < 100 < faults("as it is")
    else:
        assert not keep_freed_memory()  # a setting of glibc


def test_other_systems_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert keep_freed_memory() is False
