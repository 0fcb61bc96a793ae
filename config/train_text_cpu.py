# Trains a small model with multi-head attention on text of your own, on a CPU: 26 million tokens, an hour on one core.
# config/train_text_cpu_mla.py differs in the attention alone.
#
# $ python data/text/prepare.py --input=FOLDER --tokenizer=bpe --vocab_size=2048
# $ python train.py config/train_text_cpu.py
#
# The batches are small because induction heads form after fewer tokens by a rule, 10^5.7 sqrt(batch_size x block_size)
# (Aoyama et al. 2025, arXiv:2511.16893). On film reviews and in models of this kind on
# source code they did not (results/LOG.md, results/induction-text.md).

out_dir = 'out-text'
wandb_run_name = 'text-mha'

dataset = 'text'
gradient_accumulation_steps = 1
batch_size = 1  # 1 x 512 = 512 tokens per iteration
block_size = 512

n_layer = 2
n_head = 4
n_embd = 128
pos = 'rope'

learning_rate = 1e-3
max_iters = 50000
lr_decay_iters = 50000
warmup_iters = 200
min_lr = 1e-4
beta2 = 0.99

eval_interval = 2000
eval_iters = 128  # 128 windows of each split
log_interval = 100
