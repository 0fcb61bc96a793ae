# Trains a small model with multi-head latent attention on text of your own, on a CPU: an hour on one core.
# The same run as config/train_text_cpu.py but for the attention.
#
# $ python data/text/prepare.py --input=FOLDER --tokenizer=bpe --vocab_size=2048
# $ python train_mla.py config/train_text_cpu_mla.py

exec(open('config/train_text_cpu.py').read())

out_dir = 'out-text-mla'
wandb_run_name = 'text-mla'
attention = 'mla'
n_latent = 64  # half of n_embd
