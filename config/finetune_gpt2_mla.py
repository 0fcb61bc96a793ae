# Turns OpenAI's GPT-2 (124M parameters) into MLA with a cache 4 times smaller, and recovers its loss on OpenWebText.
#
# $ python data/openwebtext/prepare.py
# $ torchrun --standalone --nproc_per_node=8 train_mla.py config/finetune_gpt2_mla.py
#
# The conversion (core/convert/factorize.py) is made on the fly, weighted by the training text. 1000 iterations are 0.5
# billion tokens, about a twentieth of OpenWebText. It has not been run: no figure stands for it yet.

out_dir = 'out-gpt2-converted'
init_from = 'gpt2'
wandb_log = True
wandb_project = 'gpt2mla'
wandb_run_name = 'gpt2-124M-converted'

attention = 'mla'
n_latent = 384  # half of n_embd

# 0.5M tokens per iteration: 32 sequences x 1024 tokens x 16 micro-batches, over all GPUs (see train_gpt2.py).
dataset = 'openwebtext'
batch_size = 32
gradient_accumulation_steps = 2 * 8
block_size = 1024

max_iters = 1000
lr_decay_iters = 1000
warmup_iters = 50
learning_rate = 1e-4  # a sixth of what GPT-2 is trained with
min_lr = 1e-5

eval_interval = 100
eval_iters = 50
log_interval = 10
