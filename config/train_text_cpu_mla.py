# Trains a small model with multi-head latent attention on text of your own, on a CPU: an hour on one core.
# The same run as config/train_text_cpu.py but for the attention.
#
# $ python data/text/prepare.py --input=FOLDER --tokenizer=bpe --vocab_size=2048
# $ python train_mla.py config/train_text_cpu_mla.py

out_dir = 'out-text-mla'
wandb_run_name = 'text-mla'

dataset = 'text'
gradient_accumulation_steps = 1
batch_size = 1  # 1 x 512 = 512 tokens per iteration
block_size = 512

n_layer = 2
n_head = 4
n_embd = 128
pos = 'rope'
dropout = 0.0
bias = False
attention = 'mla'
n_latent = 64  # half of n_embd

learning_rate = 1e-3
max_iters = 50000
lr_decay_iters = 50000
warmup_iters = 200
min_lr = 1e-4
beta2 = 0.99

eval_interval = 2000
eval_iters = 128  # 128 windows of each split
log_interval = 100
