#!/usr/bin/env bash
# Trains on several nodes under SLURM. From the repository, after ./setup.sh on a shared file system:
#
#   sbatch launch/slurm.sh --config configs/gpt2_124m.py --workdir /shared/runs/gpt2
#
# What follows the script's name goes to train.py. The same line again goes on with the run.
#
#SBATCH --job-name=sheepop
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
# One task a GPU: under SLURM jax takes SLURM_LOCALID as the device of each process, so every task
# has to see all GPUs of its node (no --gpus-per-task, no --gpu-bind).
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# SIGTERM to the tasks five minutes before the time is up: train.py saves and exits with 75.
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" || exit 2
# jax finds the coordinator, the number of processes and their ids in SLURM's own variables.
srun .venv/bin/python train.py "$@"
status=$?
if [ "$status" -eq 75 ]; then # stopped by a signal after saving: wait for the next turn
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
