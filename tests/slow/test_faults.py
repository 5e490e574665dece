"""What may befall the disk, the network and the checkpoints of a run of several processes. Network namespaces and small disks
are root's to make."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from cadre.train.checkpoint import checkpoints
from cadre.train.metrics import read_metrics
from tests.slow.test_scale import PATIENCE, Job
from tests.train.parallel.test_equal import assert_same_run, recipe

__all__ = ["recipe"]
# Of `parallel.timeout`, in minutes, and what the processes may take to notice and end.
TIMEOUT, GRACE = 0.1, 60


def suspend(ranks: dict[int, psutil.Process]) -> None:
    for process in ranks.values():
        process.suspend()


def test_after_a_crash_that_damaged_the_newest_checkpoint_the_one_before_counts(tmp_path, recipe):
    plain = Job(recipe, tmp_path / "plain", 40)
    assert plain.end() == 0, plain.said()
    job = Job(recipe, tmp_path / "run", 40, "--restarts", "1")
    ranks = job.until(12)
    suspend(ranks)
    while any((job.out / "checkpoints").glob(".partial-*")):  # one that is being written would become the newest
        for process in ranks.values():
            process.resume()
        time.sleep(0.05)
        suspend(ranks)
    newest = checkpoints(job.out)[-1]
    file = next(newest.glob("shard-00002-*"))
    file.write_bytes(file.read_bytes()[:100])
    ranks[1].kill()
    ranks[0].resume()
    assert job.end() == 0, job.said()
    assert f"{newest.name}: damaged checkpoint ({file.name} is not as it was written): set aside" in job.said()
    assert [record["event"] for record in read_metrics(job.out) if "event" in record] == ["resumed", "finished"]
    assert_same_run(plain.out, job.out)


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_ends_the_run_which_goes_on_when_there_is_room(tmp_path, recipe):
    with small_disk(tmp_path / "run", 4):
        job = Job(recipe, tmp_path / "run", 100000)
        while not checkpoints(job.out):
            job.until(job.step() + 1)
        ballast = job.out / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(ballast.parent).free - 2**14))
        assert job.end() == 2, job.said()
        assert "the disk is full" in job.said()
        saved = checkpoints(job.out)
        assert saved and not list((job.out / "checkpoints").glob(".partial-*"))
        ballast.unlink()
        step = int(saved[-1].name.removeprefix("step-"))
        again = subprocess.run(
            [sys.executable, "-m", "cadre", "train", "--resume", str(job.out), "--nproc", "2", "--steps", str(step + 3)],
            capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert again.returncode == 0, again.stderr
        assert f"resumed from the checkpoint of step {step}" in again.stdout


class Host:
    """A machine with a network of its own: a network namespace, with one card."""

    def __init__(self, number: int) -> None:
        self.address = f"10.77.0.{number}"
        self.keeper = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        while self._network() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.01)

    def _network(self) -> Path:
        return Path(f"/proc/{self.keeper.pid}/ns/net").readlink()

    def command(self, *command: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.keeper.pid}/ns/net", *command]

    def run(self, command: str) -> None:
        subprocess.run(self.command("sh", "-c", command), check=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    first, second = hosts = Host(1), Host(2)
    try:
        first.run(f"ip link add card type veth peer name card netns {second.keeper.pid}")
        for host in hosts:
            host.run(f"ip addr add {host.address}/24 dev card")
            host.run("ip link set card up")
            host.run("ip link set lo up")
            # torchrun's agent waits for its store until the kernel gives the connection up: 15 minutes by default.
            host.run("echo 5 > /proc/sys/net/ipv4/tcp_retries2")
        yield hosts
    finally:
        for host in hosts:
            host.keeper.kill()
            host.keeper.wait()


def test_a_host_cut_off_from_the_network_ends_the_run_on_both(tmp_path, recipe):
    out = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "card"}
    work = ["-m", "cadre", "train", str(recipe), "--out", str(out), "--steps", "100000"]
    for setting in (f"parallel.timeout={TIMEOUT}", "train.log_every=1", "checkpoint.every=5", "eval.every=1000"):
        work += ["--set", setting]
    with two_hosts() as hosts:
        agents, logs = [], [tmp_path / f"host{number}.log" for number in range(2)]
        for host, log in zip(hosts, logs, strict=True):
            # Which of them has the address is found out by the name of the machine, which both share here.
            conf = f"is_host={host is hosts[0]}"
            agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend",
                     "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29400", "--local-addr", host.address,
                     "--rdzv-conf", conf]  # fmt: skip
            with log.open("w") as file:
                agents.append(subprocess.Popen(host.command(*agent, *work), stdout=file, stderr=file, env=environment))
        end = time.monotonic() + PATIENCE
        while not checkpoints(out):
            assert time.monotonic() < end and all(agent.poll() is None for agent in agents), [log.read_text() for log in logs]
            time.sleep(0.1)
        hosts[1].run("ip link set card down")
        cut = time.monotonic()
        for agent in agents:
            agent.wait(TIMEOUT * 60 + GRACE)
        took = time.monotonic() - cut
    said = [log.read_text() for log in logs]
    assert all(agent.returncode == 1 for agent in agents), said
    assert took < TIMEOUT * 60 + GRACE and sorted(
        f"cadre: rank {rank} lost the other processes: " in text for text in said for rank in range(2)
    ) == [False, False, True, True], said
