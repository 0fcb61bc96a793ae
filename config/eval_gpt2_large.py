# Measures OpenAI's GPT-2 large (774M parameters) on OpenWebText; nothing is trained.
#
# $ python data/openwebtext/prepare.py
# $ python train.py config/eval_gpt2_large.py
#
# nanoGPT's README reports a loss of 2.66 on its training split and 2.67 on its validation split (see eval_gpt2.py).

exec(open('config/eval_gpt2.py').read())

init_from = 'gpt2-large'
