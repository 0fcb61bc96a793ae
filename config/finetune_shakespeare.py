# Fine-tunes OpenAI's GPT-2 XL (1558M parameters) on Shakespeare in GPT-2's tokens.
#
# $ python data/shakespeare/prepare.py
# $ python train.py config/finetune_shakespeare.py
# $ python sample.py --out_dir=out-shakespeare --start="Once upon a time"
#
# 20 iterations, some two passes over the text. Out of memory: --init_from=gpt2-large, gpt2-medium or gpt2, or a smaller
# --block_size.

out_dir = 'out-shakespeare'
wandb_project = 'shakespeare'
wandb_run_name = 'finetune-gpt2-xl'

init_from = 'gpt2-xl'

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens per iteration; the training split has 301,966.
dataset = 'shakespeare'
batch_size = 1
gradient_accumulation_steps = 32

max_iters = 20
learning_rate = 3e-5
decay_lr = False

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # keep the best, not the last
