# Measures OpenAI's GPT-2 medium (350M parameters) on OpenWebText; nothing is trained.
#
# $ python data/openwebtext/prepare.py
# $ python train.py config/eval_gpt2_medium.py
#
# nanoGPT's README reports a loss of 2.85 on its training split and 2.84 on its validation split (see eval_gpt2.py).

exec(open('config/eval_gpt2.py').read())

init_from = 'gpt2-medium'
