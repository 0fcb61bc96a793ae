# Trains a small model with multi-head latent attention on Python source, on a CPU: a quarter of an hour on one core.
# The same run as config/train_code_cpu.py but for the attention. At r = C/2 its best rate is twice MHA's (RESULTS.md).
#
# $ python data/code/prepare.py --tokenizer=bpe --vocab_size=2048
# $ python train_mla.py config/train_code_cpu_mla.py

out_dir = 'out-code-cpu-mla'
wandb_run_name = 'code-mla'

dataset = 'code'
gradient_accumulation_steps = 1
batch_size = 4  # 4 x 256 = 1,024 tokens per iteration
block_size = 256

n_layer = 4
n_head = 4
n_embd = 128
pos = 'rope'
dropout = 0.0
bias = False
init_std = 0.0884  # 1/sqrt(n_embd)
attention = 'mla'
n_latent = 64  # half of n_embd

learning_rate = 4e-3
max_iters = 6000
lr_decay_iters = 6000
warmup_iters = 200
min_lr = 4e-4
beta2 = 0.99

eval_interval = 1000
eval_iters = 64  # 256 windows of each split
log_interval = 100
