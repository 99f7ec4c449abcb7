"""scripts/cluster/: the Slurm file with stand-ins for Slurm's commands, the others against the documented fields."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from titan_lite.config.load import load_job
from titan_lite.launch import Cluster, read_cluster

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "scripts" / "cluster"

RUN_TRAIN = """#!/usr/bin/env bash
{ for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT NGPU; do echo "$name=${!name-}"; done
  printf '[%s]\\n' "$@"; } >"node.$NODE_RANK"
exit "$(cat "code.$NODE_RANK")"
"""
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>calls
nodes=2
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids[node]=$!; done
highest=0
for pid in "${pids[@]}"; do wait "$pid" && code=0 || code=$?; ((code > highest)) && highest=$code; done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>calls
[ "$1 $2" != "show hostnames" ] || printf '%s\\n' node-a node-b
"""


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def run_slurm(folder: Path, codes: tuple[int, int], *arguments: str, job: int = 41) -> subprocess.CompletedProcess[str]:
    """What sbatch does: runs a copy of the file, in the folder where it was called."""
    checkout, spool = folder / "checkout", folder / "spool"
    for place in (checkout, spool):
        place.mkdir(exist_ok=True)
    script(checkout / "run_train.sh", RUN_TRAIN)
    script(spool / "srun", SRUN)
    script(spool / "scontrol", SCONTROL)
    for node, code in enumerate(codes):
        (checkout / f"code.{node}").write_text(str(code))
    copy = shutil.copy(FILES / "slurm.sh", spool / "slurm_script")
    env = {
        "PATH": f"{spool}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }
    return subprocess.run(["bash", copy, *arguments], env=env, cwd=spool, capture_output=True, text=True, check=False)


def test_slurm_starts_one_launcher_per_node(tmp_path: Path) -> None:
    done = run_slurm(tmp_path, (0, 0), "train_configs/my run.toml", "--job.description=a 'b' $c")
    assert (done.returncode, done.stderr) == (0, "")
    for node in (0, 1):
        *variables, config, override = (tmp_path / "checkout" / f"node.{node}").read_text().splitlines()
        found = dict(line.split("=", 1) for line in variables)
        assert read_cluster(found | {"NGPU": "8"}) == Cluster(8, 2, node, "node-a", 20041)
        assert (config, override) == ("[train_configs/my run.toml]", "[--job.description=a 'b' $c]")


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [((0, 0), 0, False), ((75, 75), 75, True), ((2, 2), 2, False), ((1, 1), 1, False), ((1, 137), 137, False)],
)
def test_slurm_queues_again_what_stopped_on_a_signal(
    codes: tuple[int, int], code: int, requeued: bool, tmp_path: Path
) -> None:
    done = run_slurm(tmp_path, codes)
    assert done.returncode == code, done.stderr
    calls = (tmp_path / "checkout" / "calls").read_text().splitlines()
    assert ("scontrol requeue 41" in calls) == requeued


def test_slurm_outside_a_checkout_says_so(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", FILES / "slurm.sh"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "call sbatch in the checkout" in done.stderr


def test_slurm_options_leave_time_to_save() -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (FILES / "slurm.sh").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == "1"
    assert options["signal"] == "USR1@600"  # without "B:": to the steps, and not to the batch shell
    assert options["open-mode"] == "append"
    assert "requeue" in options


# ---- YAML


def only(table: dict[str, Any], *keys: str) -> dict[str, Any]:
    assert set(table) <= set(keys), set(table) - set(keys)
    return table


def test_kubernetes_fields_are_those_of_the_api() -> None:
    runtime, job = yaml.safe_load_all((FILES / "kubernetes.yaml").read_text())
    for each in (runtime, job):
        assert only(each, "apiVersion", "kind", "metadata", "spec")["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", each["metadata"]["name"])
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    trainer = only(job["spec"], "runtimeRef", "trainer")["trainer"]
    only(trainer, "image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode")
    assert only(runtime["spec"], "mlPolicy", "template")["mlPolicy"]["torch"] == {"numProcPerNode": "auto"}
    sets = only(runtime["spec"]["template"]["spec"], "failurePolicy", "replicatedJobs")
    (node,) = sets["replicatedJobs"]
    # Trainer finds what it sets PET_... in by these names.
    assert node["name"] == "node"
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pods = only(node["template"]["spec"], "backoffLimit", "podFailurePolicy", "template")
    pod = only(pods["template"]["spec"], "restartPolicy", "terminationGracePeriodSeconds", "containers", "volumes")
    (container,) = pod["containers"]
    assert container["name"] == "node"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # Bad input ends the job; everything else starts all nodes again. A pod failure policy needs "Never".
    assert (pods["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    (rule,) = pods["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": "node", "operator": "In", "values": [2]}
    (fails,) = sets["failurePolicy"]["rules"]
    assert (fails["action"], fails["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert trainer["command"] == ["./run_train.sh"]
    check(trainer["args"], container["volumeMounts"][0]["mountPath"])


def check(arguments: list[str], volume: str) -> None:
    """The arguments are a config of this checkout, whose dump folder is on the volume and which checkpoints."""
    job = load_job(ROOT / arguments[0], arguments[1:], 16)
    assert job.job.dump_folder.startswith(f"{volume}/")
    assert job.checkpoint.enable


def test_skypilot_fields_are_the_documented_ones(tmp_path: Path) -> None:
    task = yaml.safe_load((FILES / "skypilot.yaml").read_text())
    only(task, "name", "workdir", "num_nodes", "resources", "volumes", "envs", "setup", "run")
    recovery = only(task["resources"], "accelerators", "job_recovery")["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    script(tmp_path / "run_train.sh", RUN_TRAIN)
    (tmp_path / "code.1").write_text("75")
    env = {
        "PATH": os.environ["PATH"],
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        **task["envs"],
    }
    done = subprocess.run(["bash", "-c", task["run"]], env=env, cwd=tmp_path, check=False)
    assert done.returncode == 75
    lines = (tmp_path / "node.1").read_text().splitlines()
    assert read_cluster(dict(line.split("=", 1) for line in lines[:5])) == Cluster(8, 2, 1, "10.0.0.1", 29500)
    check([line.strip("[]") for line in lines[5:]], *task["volumes"])
