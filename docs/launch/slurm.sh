#!/bin/bash
# One torchrun agent a node; they find each other on the first one. Submit, and submit again to go on:
#   RECIPE=v2-lite TEXT=/shared/texts RUN=/shared/runs/v2-lite sbatch docs/launch/slurm.sh
# RUN and TEXT lie on storage that all nodes share.
#SBATCH --job-name=cadre
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --output=%x-%j.log

set -euo pipefail

: "${RECIPE:?a shipped recipe or a TOML file}" "${TEXT:?files or folders to train on}" "${RUN:?the run directory}"
gpus=8
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / gpus))

# A run that is there already goes on.
run=("$RECIPE" --out "$RUN" --set "data.source=[\"$TEXT\"]")

# Agents give their processes so many seconds to save after TERM; torchrun's default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=570
# Without this the agents of several nodes cannot start again together.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# srun does not take over what sbatch was told.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# TERM, which Slurm sends ten minutes before the time is up, makes all of them save and end.
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "${nodes[0]}:29400" --rdzv-id "$SLURM_JOB_ID" \
  -m cadre train "${run[@]}"
