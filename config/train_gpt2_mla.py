# Trains a GPT of GPT-2's size on OpenWebText, with multi-head latent attention: 120.0M parameters.
#
# $ python data/openwebtext/prepare.py
# $ torchrun --standalone --nproc_per_node=8 train_mla.py config/train_gpt2_mla.py
#
# The same run as train_gpt2.py but for the attention. Somebody else's pair of these sizes, with 491,520 tokens per
# iteration, stood at a validation loss of 3.115 with MLA and 3.098 with MHA after 27,000 iterations, not from the same
# initial values and vocabulary (the logs in github.com/TachyonGun/gpt2mla).

exec(open('config/train_gpt2.py').read())

out_dir = 'out-gpt2-mla'
wandb_run_name = 'gpt2-124M-mla'
attention = 'mla'
n_latent = 384  # half of n_embd: a cache 4 times smaller than MHA's 2 x n_embd numbers per token and layer
