#!/bin/bash
# GPT training over several nodes of a Slurm cluster: sbatch examples/slurm.sh
#SBATCH --job-name=homebrew
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time is up every process gets SIGTERM: the run saves and ends.
#SBATCH --signal=TERM@120

set -euo pipefail

GPUS_PER_NODE=8
export MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000))
export PROCESSES=$((SLURM_NNODES * GPUS_PER_NODE))
# The interface that reaches the other nodes, where a node has several:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# One launcher a node; SLURM_NODEID is known only inside srun. --resume starts anew where nothing has been saved yet.
srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file accelerate_configs/multi_node.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" \
    examples/train_shakespeare.py --output-dir "$SLURM_SUBMIT_DIR/runs/shakespeare" --resume'
