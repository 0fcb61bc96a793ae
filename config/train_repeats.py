# Random blocks, repeated: the smallest set-up in which induction heads form (data/repeats/prepare.py first).
# Two layers, four heads; config/train_repeats_mla.py differs in the attention alone.
#
# $ python data/repeats/prepare.py
# $ python train.py config/train_repeats.py
# $ python train_mla.py config/train_repeats_mla.py
# $ python find_induction_heads.py --models=out-repeats,out-repeats-mla

out_dir = 'out-repeats'
wandb_run_name = 'repeats-mha'

dataset = 'repeats'
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64  # rows of 65 tokens: the data set allows no other

n_layer = 2
n_head = 4
n_embd = 64

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
