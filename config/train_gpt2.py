# Trains GPT-2 (124M parameters) on OpenWebText, with multi-head attention.
#
# $ python data/openwebtext/prepare.py
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#
# nanoGPT's README reports a loss of about 2.85 for this run, after about 4 days on 8 A100 with 40 GB, at 491,520 tokens
# per iteration. train_gpt2_mla.py is the same run with MLA.

out_dir = 'out-gpt2'
wandb_log = True
wandb_project = 'gpt2mla'
wandb_run_name = 'gpt2-124M-mha'

# 0.5M tokens per iteration: 32 sequences x 1024 tokens x 16 micro-batches = 524,288. The micro-batches are counted over
# all GPUs: 8 GPUs do 2 each.
# - GPUs of 40 GB: --batch_size=12 --gradient_accumulation_steps=40, nanoGPT's values (491,520 tokens).
# - 4, 2 or 1 GPUs: change --nproc_per_node alone. Each does 4, 8 or 16 micro-batches, and the run is the same one,
#   in 2, 4 or 8 times the time. Any number of GPUs must divide gradient_accumulation_steps.
dataset = 'openwebtext'
batch_size = 32
gradient_accumulation_steps = 2 * 8
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768

max_iters = 600000  # 315 billion tokens
lr_decay_iters = 600000
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5

eval_interval = 1000
eval_iters = 200
log_interval = 10
