# Trains a GPT small enough for a CPU on the characters of Shakespeare, with multi-head latent attention.
#
# $ python data/shakespeare_char/prepare.py
# $ python train_mla.py config/train_shakespeare_cpu_mla.py
# $ python sample_mla.py --out_dir=out-shakespeare-cpu-mla
#
# The same run as train_shakespeare_cpu.py but for the attention.

out_dir = 'out-shakespeare-cpu-mla'
wandb_project = 'shakespeare-char'
wandb_run_name = 'cpu-gpt-mla'
device = 'cpu'

dataset = 'shakespeare_char'
batch_size = 12  # 12 x 64 = 768 characters per iteration
gradient_accumulation_steps = 1
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
attention = 'mla'
n_latent = 64  # half of n_embd: a cache 4 times smaller than MHA's 2 x n_embd numbers per token and layer
dropout = 0.0  # 2000 iterations see each character about one and a half times: nothing to regularise yet

max_iters = 2000
lr_decay_iters = 2000
warmup_iters = 100
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99  # few tokens per iteration: average the squared gradients over more iterations

eval_interval = 250
eval_iters = 20
log_interval = 10
always_save_checkpoint = False  # keep the best, not the last
