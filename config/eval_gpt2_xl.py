# Measures OpenAI's GPT-2 XL (1558M parameters) on OpenWebText; nothing is trained.
#
# $ python data/openwebtext/prepare.py
# $ python train.py config/eval_gpt2_xl.py
#
# nanoGPT's README reports a loss of 2.56 on its training split and 2.54 on its validation split (see eval_gpt2.py).

exec(open('config/eval_gpt2.py').read())

init_from = 'gpt2-xl'
