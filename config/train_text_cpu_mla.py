# Trains a small model with multi-head latent attention on text of your own, byte by byte, on a CPU.
# The same run as config/train_text_cpu.py but for the attention.
#
# $ python data/text/prepare.py --input=FOLDER --tokenizer=byte
# $ python train_mla.py config/train_text_cpu_mla.py

out_dir = 'out-text-mla'
wandb_run_name = 'text-mla'

dataset = 'text'
gradient_accumulation_steps = 1
batch_size = 16  # 16 x 256 = 4,096 bytes per iteration
block_size = 256

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0
bias = False
attention = 'mla'
n_latent = 64  # half of n_embd

learning_rate = 2e-3
max_iters = 4000
lr_decay_iters = 4000
warmup_iters = 100
min_lr = 2e-4
beta2 = 0.99

eval_interval = 250
eval_iters = 64  # 1,024 windows of each split
log_interval = 50
