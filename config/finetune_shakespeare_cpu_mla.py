# Turns the GPT that train_shakespeare_cpu.py trained into MLA, and takes back what that cost.
#
# $ python train_mla.py config/finetune_shakespeare_cpu_mla.py
# $ python sample.py --out_dir=out-shakespeare-cpu-converted
#
# The conversion (core/convert/factorize.py) is made on the fly; the 200 iterations are a tenth of the training.
# convert_mla.py makes the same conversion, says what it costs, and writes a checkpoint, which --init_from takes as well
# with its size (--init_from=out-converted --n_latent=64).

out_dir = 'out-shakespeare-cpu-converted'
init_from = 'out-shakespeare-cpu'
wandb_project = 'shakespeare-char'
wandb_run_name = 'cpu-gpt-converted'
device = 'cpu'

attention = 'mla'
n_latent = 32  # a quarter of n_embd: a cache 8 times smaller than MHA's 2 x n_embd numbers per token and layer

dataset = 'shakespeare_char'
batch_size = 12  # 12 x 64 = 768 characters per iteration
gradient_accumulation_steps = 1
block_size = 64
seed = 2337  # other batches than the training began with

max_iters = 200
lr_decay_iters = 200
warmup_iters = 20
learning_rate = 5e-4  # half of the training's, since the model is nearly there
min_lr = 5e-5
beta2 = 0.99

eval_interval = 100
eval_iters = 20
log_interval = 10
