# Trains a baby GPT on the characters of Shakespeare, with multi-head latent attention.
#
# $ python data/shakespeare_char/prepare.py
# $ python train_mla.py config/train_shakespeare_char_mla.py
# $ python sample_mla.py --out_dir=out-shakespeare-char-mla
#
# The same run as train_shakespeare_char.py but for the attention. On a CPU, see train_shakespeare_cpu_mla.py.

out_dir = 'out-shakespeare-char-mla'
wandb_project = 'shakespeare-char'
wandb_run_name = 'baby-gpt-mla'

dataset = 'shakespeare_char'
batch_size = 64  # 64 x 256 = 16,384 characters per iteration; the training split has 1,003,854
gradient_accumulation_steps = 1
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
attention = 'mla'
n_latent = 192  # half of n_embd: a cache 4 times smaller than MHA's 2 x n_embd numbers per token and layer
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
