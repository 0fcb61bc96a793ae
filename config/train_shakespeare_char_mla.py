# Trains a baby GPT on the characters of Shakespeare, with multi-head latent attention.
#
# $ python data/shakespeare_char/prepare.py
# $ python train_mla.py config/train_shakespeare_char_mla.py
# $ python sample_mla.py --out_dir=out-shakespeare-char-mla
#
# The same run as train_shakespeare_char.py but for the attention. On a CPU, see train_shakespeare_cpu_mla.py.

exec(open('config/train_shakespeare_char.py').read())

out_dir = 'out-shakespeare-char-mla'
wandb_run_name = 'baby-gpt-mla'
attention = 'mla'
n_latent = 192  # half of n_embd: a cache 4 times smaller than MHA's 2 x n_embd numbers per token and layer
