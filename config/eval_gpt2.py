# Measures OpenAI's GPT-2 (124M parameters) on OpenWebText; nothing is trained.
#
# $ python data/openwebtext/prepare.py
# $ python train.py config/eval_gpt2.py
#
# nanoGPT's README reports a loss of 3.11 on its training split and 3.12 on its validation split. GPT-2 was trained on
# WebText, which is not public: fine-tuned on OpenWebText, a smaller loss is reached.

init_from = 'gpt2'
eval_only = True
eval_iters = 500  # more than in training: the figure is the result
batch_size = 8
dataset = 'openwebtext'
