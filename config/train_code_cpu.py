# Trains a small model with multi-head attention on Python source, on a CPU: RoPE, RMSNorm, SwiGLU; 5 million tokens in
# some ten minutes on one core. config/train_code_cpu_mla.py differs in the attention alone. Within 5 million
# tokens hardly any induction head forms; --norm=layer --mlp=gelu formed one (results/induction-text.md).
#
# $ python data/code/prepare.py --tokenizer=bpe --vocab_size=2048
# $ python train.py config/train_code_cpu.py
# $ python find_induction_heads.py --models=out-code-cpu
#
# Small batches, because heads form after fewer tokens then; four layers, because the induction heads read a
# previous-token head of an earlier layer.

out_dir = 'out-code-cpu'
wandb_run_name = 'code-mha'

dataset = 'code'
gradient_accumulation_steps = 1
batch_size = 4  # 4 x 256 = 1,024 tokens per iteration
block_size = 256

n_layer = 4
n_head = 4
n_embd = 128
norm = 'rms'
mlp = 'swiglu'
pos = 'rope'
init_std = 0.0884  # 1/sqrt(n_embd)

learning_rate = 4e-3
max_iters = 5000
lr_decay_iters = 5000
warmup_iters = 200
min_lr = 4e-4
beta2 = 0.99

eval_interval = 1000
eval_iters = 64  # 256 windows of each split
log_interval = 100
