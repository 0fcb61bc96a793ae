# Trains a GPT small enough for a CPU on the characters of Shakespeare, with multi-head latent attention.
#
# $ python data/shakespeare_char/prepare.py
# $ python train_mla.py config/train_shakespeare_cpu_mla.py
# $ python sample_mla.py --out_dir=out-shakespeare-cpu-mla
#
# The same run as train_shakespeare_cpu.py but for the attention. In float32 on one thread it reached a validation loss
# of 1.904, and MHA 1.905 (one seed each).

exec(open('config/train_shakespeare_cpu.py').read())

out_dir = 'out-shakespeare-cpu-mla'
wandb_run_name = 'cpu-gpt-mla'
attention = 'mla'
n_latent = 64  # half of n_embd: a cache 4 times smaller than MHA's 2 x n_embd numbers per token and layer
