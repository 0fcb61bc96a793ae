# The repeated random blocks of config/train_repeats.py, with multi-head latent attention: the same run but for the
# attention. The latent is a quarter of n_embd, as large as one head.
#
# $ python data/repeats/prepare.py
# $ python train_mla.py config/train_repeats_mla.py

out_dir = 'out-repeats-mla'
wandb_run_name = 'repeats-mla'
attention = 'mla'
n_latent = 16

dataset = 'repeats'
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64  # rows of 65 tokens: the data set allows no other

n_layer = 2
n_head = 4
n_embd = 64
dropout = 0.0
bias = False

learning_rate = 2e-3
max_iters = 2000
lr_decay_iters = 2000
warmup_iters = 50
min_lr = 2e-4
weight_decay = 0.01
beta2 = 0.999

eval_interval = 250
eval_iters = 16
log_interval = 50
