#!/usr/bin/env bash
#SBATCH --job-name=fasttht
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the end of its time the job gets SIGUSR2: the step is finished and saved, and the run exits with 75.
# Longer, if a step and a checkpoint of yours take longer.
#SBATCH --signal=USR2@120
#
# One run that goes on as often as it must: exit 75 is put into the queue again, and the same command continues.
#   sbatch examples/slurm.sh --data /data/beton --preset that-r50-free --output runs/r50
# A checkpoint every half hour limits what a crash of the node costs. Several GPUs: slurm_multi_gpu.sh.
set -uo pipefail

# srun hands signals on to the run; the shell itself must outlive them.
trap '' USR2 TERM
# Ignored signals would be inherited: env gives them back.
srun env --default-signal=USR2,TERM python -m fasttht train --checkpoint-minutes 30 "$@"
code=$?
if ((code == 75)); then
  echo "preempted and saved; into the queue again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
