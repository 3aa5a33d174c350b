#!/bin/bash
# A recipe on several machines under Slurm. From a folder that all of them share:
#
#   sbatch --nodes 2 launch/slurm.sh lora_finetune model_checkpoint=DIR dataset=FILE.jsonl
#
# It goes on from its newest checkpoint when a process is lost, when its time is up, and after a preemption.
# Change what your cluster has otherwise; docs/distributed.md says more.
#SBATCH --job-name=tune
# One agent a machine; it starts a process for each GPU.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# A requeued job writes on in its log.
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Tells this script five minutes before its time is up; a save has to fit into them.
#SBATCH --signal=B:USR1@300
set -euo pipefail

# source .venv/bin/activate
processes=${PROCESSES:-gpu}  # of each machine
recipe=${1:?name a recipe and its keys}

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# The job's own port and name: jobs that share a machine do not meet.
srun --kill-on-bad-exit=1 \
    tune run --nnodes "$SLURM_NNODES" --nproc_per_node "$processes" --max_restarts 3 \
    --rdzv_backend c10d --rdzv_endpoint "${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))" --rdzv_id "$SLURM_JOB_ID" \
    "$recipe" output_dir="runs/${SLURM_JOB_NAME}-${SLURM_JOB_ID}" resume_from_checkpoint=auto "${@:2}" &
step=$!

requeue=
trap 'requeue=yes; kill -TERM "$step"' USR1
trap 'kill -TERM "$step"' TERM
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do  # the signal has ended the waiting, not the step: it saves
    status=0
    wait "$step" || status=$?
done
if [[ $requeue && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
