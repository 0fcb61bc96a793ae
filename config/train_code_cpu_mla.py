# Trains a small model with multi-head latent attention on Python source, on a CPU: a quarter of an hour on one core.
# The same run as config/train_code_cpu.py but for the attention. At r = C/2 its best rate is twice MHA's
# (results/induction-text.md).
#
# $ python data/code/prepare.py --tokenizer=bpe --vocab_size=2048
# $ python train_mla.py config/train_code_cpu_mla.py

exec(open('config/train_code_cpu.py').read())

out_dir = 'out-code-cpu-mla'
wandb_run_name = 'code-mla'
attention = 'mla'
n_latent = 64  # half of n_embd
