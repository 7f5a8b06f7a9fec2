#!/usr/bin/env bash
#SBATCH --job-name=fasttht
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=128
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before the end of its time the job gets SIGUSR2, which torchrun hands on to all processes: they finish the
# step together, save and exit. Longer (here and in --shutdown-timeout) if a step and a checkpoint of yours take longer.
#SBATCH --signal=USR2@300
#
# slurm.sh for several GPUs, and with --nodes for several machines that share the disk of the run folder.
#   sbatch examples/slurm_multi_gpu.sh runs/r50 --data /data/beton --preset that-r50-free
# torchrun ends with 1 after any signal, so its exit code says nothing: a preempted run leaves a file in its folder.
set -uo pipefail

run=$1
shift
rm -f "$run/preempted"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# srun hands signals on to torchrun; the shell itself must outlive them.
trap '' USR2 TERM
# Ignored signals would be inherited: env gives them back.
srun env --default-signal=USR2,TERM torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-gpu}" --max-restarts 1 \
  --rdzv-backend c10d --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 10000))" \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 --shutdown-timeout 270 \
  -m fasttht train --checkpoint-minutes 30 --output "$run" "$@"
code=$?
if [[ -e $run/preempted ]]; then
  echo "preempted and saved; into the queue again"
  scontrol requeue "$SLURM_JOB_ID"
  code=75
fi
exit "$code"
