#!/bin/bash
# Train on several nodes of a Slurm cluster: sbatch examples/slurm.sh
#SBATCH --job-name=homebrew
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Send SIGTERM to every process two minutes before the time limit, so that the run saves and exits.
#SBATCH --signal=TERM@120

set -euo pipefail

GPUS_PER_NODE=8
export MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000))
export PROCESSES=$((SLURM_NNODES * GPUS_PER_NODE))
# If nodes have several network interfaces, name the one that connects them:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# One launcher per node. SLURM_NODEID is only set inside srun. Without a checkpoint, --resume starts at step 0.
srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file accelerate_configs/multi_node.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" \
    examples/train_shakespeare.py --output-dir "$SLURM_SUBMIT_DIR/runs/shakespeare" --resume'
