# Trains a baby GPT on the characters of Shakespeare, with multi-head attention.
#
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char.py
# $ python sample.py --out_dir=out-shakespeare-char
#
# Costs about 3 minutes on an A100 and reaches a best validation loss of 1.4697, by nanoGPT's README, whose settings
# these are. train_shakespeare_char_mla.py is the same run with MLA; on a CPU, see train_shakespeare_cpu.py.

out_dir = 'out-shakespeare-char'
wandb_project = 'shakespeare-char'
wandb_run_name = 'baby-gpt-mha'

dataset = 'shakespeare_char'
batch_size = 64  # 64 x 256 = 16,384 characters per iteration; the training split has 1,003,854
gradient_accumulation_steps = 1
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

max_iters = 5000
lr_decay_iters = 5000
warmup_iters = 100
learning_rate = 1e-3  # a small network bears more than GPT-2 does
min_lr = 1e-4
beta2 = 0.99  # few tokens per iteration: average the squared gradients over more iterations

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # the text is small enough to be learned by heart: keep the best, not the last
