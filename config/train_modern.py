# Trains a model of GPT-2's size and today's shape on OpenWebText, on one GPU: multi-head attention with RoPE, RMSNorm,
# SwiGLU, no biases. config/train_modern_mla.py differs in the attention alone. This pair has not been run.
#
# $ python data/openwebtext/prepare.py
# $ python train.py config/train_modern.py
#
# 20,000 iterations are 9.8 billion tokens, about one pass over OpenWebText. sizing.py estimates time and memory.

out_dir = 'out-modern'
wandb_run_name = 'modern-124M-mha'

# 32 sequences x 1,024 tokens x 15 micro-batches = 491,520 tokens per iteration; on a GPU of 24 GB --batch_size=8 and
# --gradient_accumulation_steps=60 are the same run
dataset = 'openwebtext'
batch_size = 32
gradient_accumulation_steps = 15
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
norm = 'rms'
mlp = 'swiglu'
pos = 'rope'

learning_rate = 1e-3
max_iters = 20000
lr_decay_iters = 20000
warmup_iters = 500
min_lr = 1e-4

eval_interval = 500
eval_iters = 32  # 1,024 windows of each split
log_interval = 10
