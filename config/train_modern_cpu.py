# Trains a small model of today's shape on Python source, on a CPU: multi-head attention with RoPE, RMSNorm, SwiGLU, no
# biases. It is a Llama in all but name. config/train_modern_cpu_mla.py differs in the attention alone.
#
# In bfloat16 on two cores with AMX an iteration takes 0.45 seconds, and 0.55 with MLA (BENCHMARKS.md): some 20 minutes
# in all. The pair was trained for 450 iterations, exported and served, but never to its end, so there is no loss to
# compare with.
#
# $ python data/code/prepare.py --tokenizer=bpe --vocab_size=2048
# $ python train.py config/train_modern_cpu.py

out_dir = 'out-modern-cpu'
wandb_run_name = 'modern-cpu-mha'

dataset = 'code'
gradient_accumulation_steps = 1
batch_size = 16  # 16 x 256 = 4,096 tokens per iteration
block_size = 256

n_layer = 6
n_head = 4
n_embd = 256
norm = 'rms'
mlp = 'swiglu'
pos = 'rope'
init_std = 0.0625  # 1/sqrt(n_embd)

learning_rate = 2e-3
max_iters = 2400  # 10 million tokens
lr_decay_iters = 2400
warmup_iters = 100
min_lr = 2e-4
beta2 = 0.99

eval_interval = 200
eval_iters = 16  # 256 windows of each split
log_interval = 20
