#!/usr/bin/env bash
# Look for induction heads in the two models that train_mha_*.sh and train_mla_*.sh trained, side by side. From the
# repository's folder:
#
# $ sbatch slurm_scripts/run_induction.sh
# $ sbatch slurm_scripts/run_induction.sh --models=out-one,out-another
#
#SBATCH --partition=gpu  # 1. edit: a partition with GPUs (sinfo lists them)
#SBATCH --account=my_account  # 2. edit: whose hours these are; delete the line where there are no accounts
#SBATCH --job-name=run_induction
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --output=slurm_logs/%x-%j.log
# shellcheck disable=SC1091 # it is the cluster user's own
source .venv/bin/activate # 3. edit: what makes Python with PyTorch available (module load ..., conda activate ...)

python find_induction_heads.py --models=out-gpt2,out-gpt2-mla "$@"
