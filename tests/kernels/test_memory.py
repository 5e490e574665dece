from types import SimpleNamespace

import psutil
import pytest
import torch

from cadre.kernels import memory
from cadre.kernels.memory import free_bytes, total_bytes

CPU = torch.device("cpu")


def test_here_it_is_some_and_not_more_than_there_is():
    assert 0 < free_bytes(CPU) < total_bytes(CPU) <= psutil.virtual_memory().total


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 1,000 bytes, of which 600 are available, whose containers are described in the folder."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=600))
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


def test_without_a_container_it_is_what_the_system_says(machine):
    assert (free_bytes(CPU), total_bytes(CPU)) == (600, 1000)


def test_a_container_has_its_limit_and_the_cache_in_it_gives_way(machine):
    write(machine, memory_max=500, memory_current=400, memory_stat="anon 100\ninactive_file 250")
    assert (free_bytes(CPU), total_bytes(CPU)) == (500 - (400 - 250), 500)


def test_a_container_of_version_1(machine):
    write(
        machine / "memory",
        memory_limit_in_bytes=500,
        memory_usage_in_bytes=450,
        memory_stat="inactive_file 1\ntotal_inactive_file 0",
    )
    assert (free_bytes(CPU), total_bytes(CPU)) == (50, 500)


def test_a_container_without_a_limit_has_what_the_machine_has(machine):
    write(machine, memory_max="max", memory_current=400, memory_stat="inactive_file 250")
    assert (free_bytes(CPU), total_bytes(CPU)) == (600, 1000)


def test_a_container_that_may_have_more_than_there_is_or_has_gone_beyond_its_limit(machine):
    write(machine, memory_max=5000, memory_current=400, memory_stat="inactive_file 250")
    assert (free_bytes(CPU), total_bytes(CPU)) == (600, 1000)
    write(machine, memory_max=100)
    assert (free_bytes(CPU), total_bytes(CPU)) == (0, 100)
