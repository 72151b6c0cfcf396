#!/usr/bin/env bash
# Trains on several nodes under SLURM. Run ./setup.sh on a shared file system, then, from the
# repository:
#
#   sbatch launch/slurm.sh --config configs/gpt2_124m.py --workdir /shared/runs/gpt2
#
# Arguments are passed to train.py. Submit the same command again to resume.
#
#SBATCH --job-name=sheepop
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
# One task per GPU: under SLURM, JAX uses SLURM_LOCALID as the device of each process, so every task
# must see all GPUs of its node (no --gpus-per-task, no --gpu-bind).
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# SIGTERM five minutes before the time limit: train.py saves a checkpoint and exits with 75.
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit 2
# JAX reads the coordinator, the number of processes and their ids from SLURM's variables.
srun .venv/bin/python train.py "$@"
status=$?
if [ "$status" -eq 75 ]; then # stopped by a signal after saving: requeue
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
