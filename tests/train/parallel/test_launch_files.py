"""The launch files of docs/, as far as a machine without a cluster can try them: they are run with stand-ins for the cluster's
commands, and what they would start is read by torchrun's own parser."""

from __future__ import annotations

import os
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from cadre.train.recipe import read_recipe

LAUNCH = Path(__file__).parents[3] / "docs" / "launch"
STAND_INS = {"srun": '"$@"', "scontrol": "printf 'node7\\nnode9\\n'", "torchrun": "printf '%s\\n' \"$@\""}
SLURM = {"SLURM_JOB_NODELIST": "node[7,9]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "64"}


# Without it agents of several machines cannot start again together.
TOGETHER = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def dry_run(folder: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The command with stand-ins; its output is torchrun's arguments, a line each."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, script in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    return subprocess.run(command, env={"PATH": path, **environment}, capture_output=True, text=True, timeout=60)


def parsed(output: str, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Namespace:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return get_args_parser().parse_args(output.splitlines())


def checked(started: Namespace, run: Path | str, nodes: str) -> None:
    assert (started.nnodes, started.nproc_per_node, started.max_restarts) == (nodes, "8", 3)
    assert (started.rdzv_backend, started.module, started.training_script) == ("c10d", True, "cadre")
    verb, recipe, *rest = started.training_script_args
    assert verb == "train" and rest[:2] == ["--out", str(run)] and rest[2] == "--set"
    assert read_recipe(recipe, [rest[3]]).data.source == ["/shared/texts"]


def test_slurm(tmp_path, monkeypatch):
    script, run = LAUNCH / "slurm.sh", tmp_path / "run"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    given = {**SLURM, "RECIPE": "v2-lite", "TEXT": "/shared/texts", "RUN": str(run)}
    first = parsed(dry_run(tmp_path, ["bash", str(script)], **given).stdout, monkeypatch)
    checked(first, run, "2")
    assert (first.rdzv_endpoint, first.rdzv_id) == ("node7:29400", "42")
    assert f"export {TOGETHER}=1\n" in script.read_text()


def test_slurm_says_what_it_was_not_given(tmp_path):
    ended = dry_run(tmp_path, ["bash", str(LAUNCH / "slurm.sh")], **SLURM, RECIPE="node", TEXT="x")
    assert ended.returncode != 0 and "RUN: the run directory" in ended.stderr and ended.stdout == ""


# Of the schema of PyTorchJob v1 in Kubeflow's training operator: what there is at the levels that this file uses.
SPEC = {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"}
ELASTIC = {
    "maxReplicas", "maxRestarts", "metrics", "minReplicas", "nProcPerNode", "rdzvBackend", "rdzvConf", "rdzvHost", "rdzvId",
    "rdzvPort", "standalone",
}  # fmt: skip
RESTARTS = {"Always", "OnFailure", "Never", "ExitCode"}


def test_kubernetes(tmp_path, monkeypatch):
    job: dict[str, Any] = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob") and job["metadata"]["name"]
    spec, elastic = job["spec"], job["spec"]["elasticPolicy"]
    assert spec.keys() <= SPEC and elastic.keys() <= ELASTIC and isinstance(spec["nprocPerNode"], str)
    assert spec["pytorchReplicaSpecs"].keys() == {"Worker"}
    workers = spec["pytorchReplicaSpecs"]["Worker"]
    assert workers.keys() == {"replicas", "restartPolicy", "template"} and workers["restartPolicy"] in RESTARTS
    assert elastic["minReplicas"] == elastic["maxReplicas"] == workers["replicas"]
    pod = workers["template"]["spec"]
    (container,) = [one for one in pod["containers"] if one["name"] == "pytorch"]  # the one that the operator sets up
    assert {"name": TOGETHER, "value": "1"} in container["env"]
    assert container["image"] and container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    told = {
        "PET_RDZV_BACKEND": elastic["rdzvBackend"], "PET_RDZV_ENDPOINT": "cadre-worker-0:23456",
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}", "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
    }  # fmt: skip
    ended = dry_run(tmp_path, container["command"])
    checked(parsed(ended.stdout, monkeypatch, **told), "/shared/runs/v2-lite", "2:2")
