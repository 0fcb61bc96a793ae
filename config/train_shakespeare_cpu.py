# Trains a GPT small enough for a CPU on the characters of Shakespeare, with multi-head attention.
#
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_cpu.py
# $ python sample.py --out_dir=out-shakespeare-cpu
#
# The sizes are those that nanoGPT's README gives for a CPU, where they cost about 3 minutes and reach a loss of
# 1.88. train_shakespeare_cpu_mla.py is the same run with MLA.

out_dir = 'out-shakespeare-cpu'
wandb_project = 'shakespeare-char'
wandb_run_name = 'cpu-gpt-mha'
device = 'cpu'

dataset = 'shakespeare_char'
batch_size = 12  # 12 x 64 = 768 characters per iteration
gradient_accumulation_steps = 1
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # 2000 iterations see each character about one and a half times: nothing to regularize yet

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
