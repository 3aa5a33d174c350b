"""launch/: the Slurm script runs with stand-ins for Slurm's commands; Kubernetes' job files fit their schemas and start."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launching import wait_for
from tests.recipes.conftest import ROWS, metrics_of
from tests.tiny_checkpoint import save_tiny_checkpoint
from torchtune.cli import agent
from torchtune.cli.tune import call

pytestmark = pytest.mark.usefixtures("kept_environment")
LAUNCH = Path(__file__).parent.parent / "launch"

# srun: the command once a machine, SIGTERM passed on, the worst status. scontrol: names, and a note of what was asked.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM "${tasks[@]}"' TERM
for _ in $(seq "$SLURM_NNODES"); do "$@" & tasks+=($!); done
worst=0
for task in "${tasks[@]}"; do
    while true; do
        status=0
        wait "$task" || status=$?
        kill -0 "$task" 2>/dev/null || break
    done
    (( status > worst )) && worst=$status
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf 'localhost\\nlocalhost\\n' ;;
    requeue) echo "$2" >> requeued ;;
esac
"""
TUNE = f"""#!/bin/bash
exec {shlex.quote(sys.executable)} -m torchtune.cli.tune "$@"
"""


@pytest.fixture
def slurm(tmp_path):
    """Submit the script in a folder with a tiny model; returns the process of the batch shell."""
    for name, program in {"srun": SRUN, "scontrol": SCONTROL, "tune": TUNE}.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(program)
        file.chmod(0o755)
    save_tiny_checkpoint(tmp_path / "DIR")
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PROCESSES": "1",
        **{"SLURM_NNODES": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "tune", "SLURM_JOB_NODELIST": "x"},
    }

    def submit(*keys):
        script = ["bash", LAUNCH / "slurm.sh", "full_finetune", "model_checkpoint=DIR", f"dataset={ROWS}", "dtype=fp32"]
        return subprocess.Popen([*script, *keys], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    return submit


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_slurm_job_saves_when_its_time_is_up_and_goes_on_when_requeued(slurm, tmp_path):
    """Two agents on this machine. Saved once, as one; asked to be queued again; the second job makes the rest."""
    out = tmp_path / "runs" / f"tune-{os.getpid()}"
    keys = ("max_seq_len=128", "gradient_accumulation_steps=1", "epochs=1000", "save_every_n_steps=100000")
    job = slurm(*keys, "max_steps=5000")
    wait_for(lambda: (out / "metrics.jsonl").exists())
    job.send_signal(signal.SIGUSR1)
    _, stderr = job.communicate(timeout=90)
    assert job.returncode == 128 + signal.SIGTERM, stderr
    (saved,) = out.glob("step_*")
    assert stderr.count(f"saved in {saved.relative_to(tmp_path)}") == 1
    assert (tmp_path / "requeued").read_text().split() == [str(os.getpid())]

    steps = int(saved.name[5:]) + 3
    again = slurm(*keys, f"max_steps={steps}")
    _, stderr = again.communicate(timeout=90)
    assert again.returncode == 0, stderr
    assert [line["step"] for line in metrics_of(out)] == list(range(1, steps + 1))
    assert (tmp_path / "requeued").read_text().count("\n") == 1


def test_the_slurm_script_says_what_it_lacks(slurm):
    """No recipe: no job step."""
    done = subprocess.run(["bash", "-n", LAUNCH / "slurm.sh"], check=False)
    assert done.returncode == 0
    env = {"PATH": os.environ["PATH"], "SLURM_JOB_NODELIST": "x"}
    done = subprocess.run(["bash", LAUNCH / "slurm.sh"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0


# The fields of PyTorchJob v1 that a job may have, from the published reference of the training operator 1.9. A pod's
# template is checked by the models of Kubernetes' own fields.
PYTORCH_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str, "labels": dict},
    "spec": {
        "nprocPerNode": str,
        "elasticPolicy": {
            **{"minReplicas": int, "maxReplicas": int, "maxRestarts": int, "nProcPerNode": int, "rdzvPort": int},
            **{
                "rdzvBackend": str,
                "rdzvHost": str,
                "rdzvId": str,
                "rdzvConf": list,
                "standalone": bool,
                "metrics": list,
            },
        },
        "runPolicy": {
            **{"activeDeadlineSeconds": int, "backoffLimit": int, "cleanPodPolicy": str, "managedBy": str},
            **{"schedulingPolicy": dict, "suspend": bool, "ttlSecondsAfterFinished": int},
        },
        "pytorchReplicaSpecs": {
            role: {"replicas": int, "restartPolicy": str, "template": dict} for role in ("Master", "Worker")
        },
    },
}


def misfits(value, schema, where=""):
    """Where a value has a field that the schema lacks, or of another type."""
    if isinstance(schema, type):
        return [] if isinstance(value, schema) and not (schema is int and value is True) else [where]
    if not isinstance(value, dict):
        return [where]
    inner = [
        misfits(value[key], schema[key], f"{where}.{key}") if key in schema else [f"{where}.{key}"] for key in value
    ]
    return [place for places in inner for place in places]


def same_after_reading(document, model):
    """Whether a model of the API takes the document, and drops no field of it."""
    return model.from_dict(document).to_dict() == document


def test_the_pytorch_job_fits_its_schema():
    """Names and types, and the values that its fields may have."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job = yaml.safe_load((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text())
    assert misfits(job, PYTORCH_JOB) == []
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"]["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert [container["name"] for container in worker["template"]["spec"]["containers"]] == ["pytorch"]
    assert same_after_reading(worker["template"], models.IoK8sApiCoreV1PodTemplateSpec)


def test_the_train_job_fits_its_schema():
    """By the models that Kubeflow Trainer publishes."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job = yaml.safe_load((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())
    assert same_after_reading(job, models.TrainerV1alpha1TrainJob)
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")


# What the controllers put into a pod's environment.
PYTORCH_JOB_POD = {
    **{"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "finetune-worker-0:23456", "PET_NNODES": "2:2"},
    **{"PET_MAX_RESTARTS": "10", "RANK": "1", "WORLD_SIZE": "2"},
}
TRAIN_JOB_POD = {
    **{"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1"},
    **{"PET_MASTER_ADDR": "finetune-node-0-0.finetune", "PET_MASTER_PORT": "29400"},
}


def command_of(name, environment):
    """What the container runs, as words."""
    job = yaml.safe_load((LAUNCH / "kubernetes" / f"{name}.yaml").read_text())
    if name == "pytorchjob":
        return job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["command"]
    (text,) = job["spec"]["trainer"]["args"]
    shown = subprocess.run(
        ["bash", "-c", text.replace("exec tune", "printf '%s\\n' tune")], env=environment, capture_output=True
    )
    return shown.stdout.decode().splitlines()


@pytest.mark.parametrize(
    ("name", "environment", "endpoint"),
    [
        ("pytorchjob", PYTORCH_JOB_POD, "finetune-worker-0:23456"),
        ("trainjob", TRAIN_JOB_POD, "finetune-node-0-0.finetune:29400"),
    ],
)
def test_a_kubernetes_job_starts_what_it_says(name, environment, endpoint, tmp_path, monkeypatch):
    """In a pod's environment the command validates, for sixteen ranks, and hands the agent the place to meet."""
    started = []
    monkeypatch.setattr(agent, "launch", lambda config, *command: started.append(config) or 0)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    save_tiny_checkpoint(tmp_path / "MODEL")
    (tmp_path / "chats.jsonl").write_bytes(ROWS.read_bytes())
    tune, *arguments = [word.replace("/shared", str(tmp_path)) for word in command_of(name, environment)]
    assert tune == "tune"
    assert call(arguments) == 0
    (config,) = started
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", endpoint)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (2, 2, 8, 10)
