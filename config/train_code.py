# Trains a model of 26 million parameters with multi-head attention on Python source, for one GPU: 330 million tokens.
# config/train_code_mla.py differs in the attention alone. This pair has not been run.
#
# $ python data/code/prepare.py --tokenizer=bpe --vocab_size=2048
# $ python train.py config/train_code.py

out_dir = 'out-code'
wandb_run_name = 'code-gpu-mha'

dataset = 'code'
gradient_accumulation_steps = 1
batch_size = 64  # 64 x 512 = 32,768 tokens per iteration
block_size = 512

n_layer = 8
n_head = 8
n_embd = 512
pos = 'rope'

learning_rate = 1e-3
max_iters = 10000
lr_decay_iters = 10000
warmup_iters = 200
min_lr = 1e-4
beta2 = 0.99

eval_interval = 500
eval_iters = 16  # 1,024 windows of each split
log_interval = 10
