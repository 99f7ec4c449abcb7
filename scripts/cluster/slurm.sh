#!/usr/bin/env bash
# Trains on several nodes under Slurm. From the checkout, which all nodes see:
#
#   sbatch scripts/cluster/slurm.sh CONFIG.toml [--section.key=value ...]
#   sbatch --nodes=4 --gpus-per-node=4 --time=2:00:00 scripts/cluster/slurm.sh CONFIG.toml
#
# Ten minutes before the time limit, and when it is preempted, the run saves and stops with exit code 75; the job is then
# queued again under its own id and goes on from its checkpoint. The config must have checkpoint.enable = true, and its
# job.dump_folder must lie on a file system that all nodes see.
#
#SBATCH --job-name=titan_lite
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

# Slurm runs a copy of this file: the checkout is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?is not set: start this file with sbatch}"
if [ ! -x ./run_train.sh ]; then
    echo "titan_lite: no run_train.sh in $PWD: call sbatch in the checkout" >&2
    exit 2
fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=${#hosts[@]} MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# Signals reach the launchers through srun; this shell only waits for their exit code.
trap : TERM USR1
code=0
# One launcher per node. Where one has ended, the others have a minute to do so too: those of a failed node would wait
# for it, and those that save need not be killed.
# shellcheck disable=SC2016  # each node has a SLURM_NODEID of its own
srun --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 \
    bash -c 'NODE_RANK=$SLURM_NODEID exec ./run_train.sh "$@"' run_train.sh "$@" || code=$?

if [ "$code" -eq 75 ]; then
    echo "titan_lite: stopped after saving; queueing job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
