#!/usr/bin/env bash
# Train a GPT-2 (124M) with multi-head attention on one node of 8 GPUs. From the repository's folder:
#
# $ sbatch slurm_scripts/train_mha_1node.sh
# $ sbatch --gpus-per-node=4 --time=08:00:00 slurm_scripts/train_mha_1node.sh --max_iters=100000 --lr_decay_iters=100000
#
#SBATCH --partition=gpu  # 1. edit: a partition with GPUs (sinfo lists them)
#SBATCH --account=my_account  # 2. edit: whose hours these are; delete the line where there are no accounts
#SBATCH --job-name=train_mha_1node
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=slurm_logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# shellcheck disable=SC1091 # it is the cluster user's own
source .venv/bin/activate # 3. edit: what makes Python with PyTorch available (module load ..., conda activate ...)
# export NCCL_IB_DISABLE=1 # on a cluster without InfiniBand

source slurm_scripts/launch.sh
launch train.py config/train_gpt2.py "$@"
