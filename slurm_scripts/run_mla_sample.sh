#!/usr/bin/env bash
# Sample from the GPT with multi-head latent attention that train_mla_*.sh trained. The text is in the log.
# From the repository's folder:
#
# $ sbatch slurm_scripts/run_mla_sample.sh --start="Once upon a time" --num_samples=5
# $ sbatch slurm_scripts/run_mla_sample.sh --out_dir=out-elsewhere
#
#SBATCH --partition=gpu  # 1. edit: a partition with GPUs (sinfo lists them)
#SBATCH --account=my_account  # 2. edit: whose hours these are; delete the line where there are no accounts
#SBATCH --job-name=run_mla_sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=00:30:00
#SBATCH --output=slurm_logs/%x-%j.log
# shellcheck disable=SC1091 # it is the cluster user's own
source .venv/bin/activate # 3. edit: what makes Python with PyTorch available (module load ..., conda activate ...)

python sample_mla.py --out_dir=out-gpt2-mla "$@"
