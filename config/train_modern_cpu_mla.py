# Trains a small model with multi-head latent attention as published, on Python source, on a CPU: 32 rotated dimensions
# beside 64 of content, RMSNorm on the latent. It is a dense DeepSeek-V3 in all but name. The same run as
# config/train_modern_cpu.py but for the attention.
#
# $ python data/code/prepare.py --tokenizer=bpe --vocab_size=2048
# $ python train_mla.py config/train_modern_cpu_mla.py

exec(open('config/train_modern_cpu.py').read())

out_dir = 'out-modern-cpu-mla'
wandb_run_name = 'modern-cpu-mla'
attention = 'mla'
n_latent = 128  # half of n_embd: 128 + 32 cached numbers per token and layer instead of 512
latent_norm = True
