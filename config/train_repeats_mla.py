# The repeated random blocks of config/train_repeats.py, with multi-head latent attention: the same run but for the
# attention. The latent is a quarter of n_embd, as large as one head.
#
# $ python data/repeats/prepare.py
# $ python train_mla.py config/train_repeats_mla.py

exec(open('config/train_repeats.py').read())

out_dir = 'out-repeats-mla'
wandb_run_name = 'repeats-mla'
attention = 'mla'
n_latent = 16
