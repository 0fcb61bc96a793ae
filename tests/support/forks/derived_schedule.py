"""A schedule that is computed from an amount of text, with helper variables and whole numbers in powers of ten."""

import math

tokens = 4e6
tokens_per_step = 16 * 256
steps = math.ceil(tokens / tokens_per_step)

batch_size = 16
block_size = 256
gradient_accumulation_steps = 1
max_iters = 1e3
lr_decay_iters = steps
warmup_iters = steps // 50
eval_iters = 4e1
learning_rate = 3e-3
min_lr = learning_rate / 10
wandb_run_name = f'schedule-{steps}-of-{tokens / 1e6:g}M'
