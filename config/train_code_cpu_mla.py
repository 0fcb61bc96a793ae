# Trains a small model with multi-head latent attention as published on Python source, on a CPU. The same run as
# config/train_code_cpu.py but for the attention, whose cache is as small as MQA's (results/induction-text.md).
#
# $ python data/code/prepare.py --tokenizer=bpe --vocab_size=2048
# $ python train_mla.py config/train_code_cpu_mla.py

exec(open('config/train_code_cpu.py').read())

out_dir = 'out-code-cpu-mla'
wandb_run_name = 'code-mla'
attention = 'mla'
n_latent = 48  # and 16 rotated numbers
latent_norm = True
