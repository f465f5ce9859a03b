"""The launchers: their form, and the commands that each node comes to by them."""

import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.examples.scripts import LLAMA, ROOT, calls, commands, environment, trainings

LAUNCHERS = ROOT / "examples" / "launchers"
# What the scripts read, and torchrun's own.
READ = "".join((ROOT / "examples" / name).read_text() for name in ("stages.sh", "running.sh", "settings.sh", LLAMA))


def run(words: list[str], variables: dict[str, str]) -> str:
    result = subprocess.run(words, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_launcher_is_tested_here() -> None:
    assert {path.name for path in LAUNCHERS.iterdir()} == {
        *("slurm.sbatch", "kubernetes.yaml", "jobset.yaml", "pytorchjob.yaml", "torchrun.sh")
    }


def slurm(tmp_path: Path, **more: str) -> str:
    tools = tmp_path / "bin"
    variables = environment(tmp_path, DRY_RUN="1", HF_MODEL="m", DATA="d", **more)
    (tools / "scontrol").write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    (tools / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do echo "srun $1=$2"; shift 2; done\nSLURM_NODEID=1 exec "$@"\n'
    )
    for name in ("scontrol", "srun"):
        (tools / name).chmod(stat.S_IRWXU)
    variables |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "12345", "SLURM_GPUS_ON_NODE": "8"}
    return run(["bash", "examples/launchers/slurm.sbatch", "--epochs", "2"], variables)


def test_slurm_gives_every_node_its_rank(tmp_path: Path) -> None:
    output = slurm(tmp_path)
    assert "--nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr node7 --master-port 32345 --max-restarts 3" in output
    assert trainings(output)[0].training.epochs == 2.0
    assert "srun" not in output


def test_slurm_starts_it_in_a_container_where_one_is_named(tmp_path: Path) -> None:
    output = slurm(tmp_path, CONTAINER_IMAGE="/shared/m.sqsh", CONTAINER_MOUNTS="/shared:/shared")
    assert [line for line in output.splitlines() if line.startswith("srun")] == [
        "srun --container-image=/shared/m.sqsh",
        "srun --container-workdir=/workspace/megatron_rmipo",
        "srun --container-mounts=/shared:/shared",
    ]
    assert "--node-rank 1" in output


def test_slurm_is_asked_for_a_task_a_node_and_for_time_to_save() -> None:
    lines = (LAUNCHERS / "slurm.sbatch").read_text().splitlines()
    asked = dict(re.fullmatch(r"#SBATCH --([\w-]+)=?(.*)", line).groups() for line in lines if line.startswith("#SBATCH"))  # type: ignore[union-attr]
    assert (asked["nodes"], asked["ntasks-per-node"], asked["signal"]) == ("2", "1", "TERM@300")
    assert "requeue" in asked
    # Slurm reads none after the first command.
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))


def test_torchrun_starts_ranks_anew(tmp_path: Path) -> None:
    variables = environment(tmp_path, DRY_RUN="1", HF_MODEL="m", DATA="d", NODE_RANK="1", NUM_NODES="2", MASTER_ADDR="node0")
    output = run(["bash", "examples/launchers/torchrun.sh", "--lr", "1e-6"], variables)
    (words,) = [" ".join(command) for command in commands(output) if "megatron_rmipo.launch" in command]
    assert "--nnodes 2 --node-rank 1 --master-addr node0 --master-port 6000 --max-restarts 3" in words
    assert words.endswith("--lr 1e-6")


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["spec"]["containers"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
    assert pod["spec"]["terminationGracePeriodSeconds"] == 300
    return container


def variables_of(container: dict[str, Any], **of_the_cluster: str) -> dict[str, str]:
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(name in READ for name in values)
    assert all(values[name].startswith("/shared/") for name in ("HF_MODEL", "DATA", "WORK_DIR"))
    assert values["GPUS_PER_NODE"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    return {**values, **of_the_cluster}


def command_of(container: dict[str, Any], tmp_path: Path, **of_the_cluster: str) -> str:
    """The trainer's command, by what the container runs."""
    variables = environment(tmp_path, **variables_of(container, **of_the_cluster), DRY_RUN="1")
    output = run(container["command"], variables)
    assert calls(tmp_path) == []
    (line,) = [command for command in commands(output) if "megatron_rmipo.launch" in command]
    return " ".join(line)


def test_the_kubernetes_job_numbers_its_pods(tmp_path: Path) -> None:
    service, job = yaml.safe_load_all((LAUNCHERS / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod = job["spec"]["template"]
    container = container_of(pod)
    values = variables_of(container)
    assert values["NUM_NODES"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    assert values["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    command = command_of(container, tmp_path, JOB_COMPLETION_INDEX="1")
    assert "--nnodes 2 --node-rank 1 --master-addr rmipo-0.rmipo --master-port 6000" in command


def test_the_job_set_finds_its_first_pod_and_starts_all_anew(tmp_path: Path) -> None:
    job_set = yaml.safe_load((LAUNCHERS / "jobset.yaml").read_text())
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job_set["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    # The set starts anew what a job gives up, and jobs give up at once.
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    container = container_of(job["template"])
    values = variables_of(container)
    assert values["NUM_NODES"] == str(job["completions"]) == str(job["parallelism"])
    name = job_set["metadata"]["name"]
    # Set, replicated job, number of the job, number of the pod; the subdomain is the set's.
    assert values["MASTER_ADDR"] == f"{name}-{replicated['name']}-0-0.{name}"
    assert "--node-rank 1" in command_of(container, tmp_path, JOB_COMPLETION_INDEX="1")


def test_the_pytorch_job_has_a_pod_a_node_and_takes_the_operators_numbers(tmp_path: Path) -> None:
    job = yaml.safe_load((LAUNCHERS / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert "elasticPolicy" not in job["spec"]
    kinds = job["spec"]["pytorchReplicaSpecs"]
    master, worker = kinds["Master"], kinds["Worker"]
    assert {kind["restartPolicy"] for kind in kinds.values()} == {"OnFailure"}
    assert master["template"] == worker["template"]
    container = container_of(master["template"])
    # The operator sets its variables in the container of this name alone.
    assert container["name"] == "pytorch"
    assert variables_of(container)["NUM_NODES"] == str(master["replicas"] + worker["replicas"])
    of_the_operator = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "rmipo-master-0", "MASTER_PORT": "23456"}
    command = command_of(container, tmp_path, **of_the_operator)
    assert "--nnodes 2 --node-rank 1 --master-addr rmipo-master-0 --master-port 23456 --max-restarts 3" in command


def test_images_of_both_kinds_are_of_one_base_and_hold_what_the_launchers_start() -> None:
    docker, apptainer = ((ROOT / "containers" / name).read_text() for name in ("Dockerfile", "apptainer.def"))
    bases = [re.search(r"(?:BASE=|From: )(nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3)", text) for text in (docker, apptainer)]
    assert len({base[1] for base in bases if base is not None}) == 1
    assert None not in bases
    workdir = re.search(r"^WORKDIR (.+)$", docker, re.MULTILINE)
    assert workdir is not None
    assert workdir[1] == "/workspace/megatron_rmipo"
    copied = {source for line in re.findall(r"^COPY (.+)$", docker, re.MULTILINE) for source in line.split()[:-1]}
    listed = {line.split()[0] for line in apptainer.partition("%files")[2].partition("%post")[0].strip().splitlines()}
    assert copied == listed
    assert all((ROOT / name).exists() for name in copied)
    assert {"examples", "tools", "megatron_rmipo"} <= copied


def test_what_the_images_install_is_pinned_and_is_what_the_project_needs() -> None:
    lines = (ROOT / "containers" / "requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    listed = re.search(r"^REQUIREMENTS = \[$(.+?)^\]$", (ROOT / "setup.py").read_text(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    needed = set(re.findall(r'^    "([\w-]+)', listed[1], re.MULTILINE))
    assert len(needed) > 10
    # The base image has its own.
    assert needed - {"torch", "numpy"} <= pinned.keys()
