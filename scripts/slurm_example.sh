#!/usr/bin/env bash
# All options are the training's: sbatch scripts/slurm_example.sh [options of main.py]
# A teacher on two nodes of a Slurm cluster.
# Start it from the repository, on a file system that all nodes share. Make the environment first,
# where there is a network (bash scripts/environment.sh), and put the data below ./data.
#
# To change: the lines below for your cluster (many need --account and --partition too).
#SBATCH --job-name=md-snn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=20
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.txt
# One task a node: torchrun, which starts a process a GPU. CPUs: for each process and its 4 --workers.
set -euo pipefail
if [[ " $* " == *" --help "* ]]; then
    sed -n '/^#$/q; /^#!/d; s/^# //p' "$0"
    exit
fi
# Slurm runs a copy of this file from elsewhere.
cd "${SLURM_SUBMIT_DIR:?is set by Slurm: start this with sbatch}"
export PATH="$PWD/.venv/bin:$PATH"

# The nodes meet at the first host of the allocation; a port of the job's own, as jobs share nodes.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint=${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))

# srun of Slurm 22.05 and later does not take --cpus-per-task over from sbatch.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# A requeued job has the same number, and goes on.
# To change: data and training. --batch_size is the global batch, here 32 images on each of 8 GPUs.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$endpoint" \
    main.py --data CIFAR100 --paper_setting original --model_depth 18 --time_window 4 \
    --batch_size 256 --seed 1234 --data_path ./data \
    --save_path "checkpoints/slurm-$SLURM_JOB_ID" --resume "$@"
