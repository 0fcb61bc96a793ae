# Trains a model with multi-head latent attention on Python source, for one GPU. The same run as config/train_code.py
# but for the attention.
#
# $ python data/code/prepare.py --tokenizer=bpe --vocab_size=2048
# $ python train_mla.py config/train_code_mla.py

out_dir = 'out-code-mla'
wandb_run_name = 'code-gpu-mla'

dataset = 'code'
gradient_accumulation_steps = 1
batch_size = 64  # 64 x 512 = 32,768 tokens per iteration
block_size = 512

n_layer = 8
n_head = 8
n_embd = 512
pos = 'rope'
dropout = 0.0
bias = False
attention = 'mla'
n_latent = 256  # half of n_embd

learning_rate = 1e-3
max_iters = 10000
lr_decay_iters = 10000
warmup_iters = 200
min_lr = 1e-4
beta2 = 0.99

eval_interval = 500
eval_iters = 16  # 1,024 windows of each split
log_interval = 10
