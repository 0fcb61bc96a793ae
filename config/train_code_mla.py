# Trains a model with multi-head latent attention on Python source, for one GPU. The same run as config/train_code.py
# but for the attention.
#
# $ python data/code/prepare.py --tokenizer=bpe --vocab_size=2048
# $ python train_mla.py config/train_code_mla.py

exec(open('config/train_code.py').read())

out_dir = 'out-code-mla'
wandb_run_name = 'code-gpu-mla'
attention = 'mla'
n_latent = 256  # half of n_embd
