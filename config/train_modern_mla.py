# Trains a model of GPT-2's size with multi-head latent attention as published on OpenWebText, on one GPU: 32 rotated
# dimensions beside 64 of content, RMSNorm on the latent. The same run as config/train_modern.py but for the attention.
# This pair has not been run.
#
# $ python data/openwebtext/prepare.py
# $ python train_mla.py config/train_modern_mla.py

exec(open('config/train_modern.py').read())

out_dir = 'out-modern-mla'
wandb_run_name = 'modern-124M-mla'
attention = 'mla'
n_latent = 384  # half of n_embd: 384 + 32 cached numbers per token and layer instead of 1,536
latent_norm = True
