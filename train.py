"""
Train a GPT, with multi-head attention or (through train_mla.py) multi-head latent attention. The only training loop.

On a CPU, on one GPU, or with as many processes as there are GPUs, on one node or several:
$ python train.py config/train_shakespeare_cpu.py
$ python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
$ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
$ torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/train_gpt2.py

Resume a run that stopped, for whatever reason. Keys that you don't give come from its checkpoint:
$ python train.py --resume=yes --out_dir=out-shakespeare-cpu
$ python train.py config/train_shakespeare_cpu.py --resume=auto  # resumes where there is a run, otherwise starts one
"""

from core.cli import keys, signals

stop_request = signals.StopRequest()  # before the slow imports, so that a signal that arrives during them counts
keys.check_early(__file__)

import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import fields

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from core.cli import machine
from core.cli.arguments import check_folder, whole_numbers
from core.cli.errors import UserError, is_rank_zero, notice
from core.runs import evaluation, models
from core.runs import resume as resuming
from core.runs.checkpoint import Writer
from core.runs.folder import RunFolder
from core.runs.log import RunLog, start_wandb
from core.runs.processes import seed_dropout, shard, start
from core.speed.gpus import peak_flops
from core.text.dataset import TokenData
from ops import optimizers

# ----------------------------------------------------------------------------------------------------------------------
# output
out_dir = 'out'
init_from = 'scratch'  # or a checkpoint, 'gpt2' (-medium, -large, -xl), a Hugging Face folder, a GGUF file
resume = 'no'  # 'yes': continue the run in out_dir; 'auto': where there is one, otherwise start from init_from
overwrite = False  # discard the run that out_dir holds, and start a new one
eval_interval = 2000  # iterations between evaluations
log_interval = 1  # iterations between rows of log.csv
eval_iters = 200  # evaluate on at most eval_iters * batch_size windows per split, always the same
eval_only = False  # evaluate once and exit: no training, nothing written
always_save_checkpoint = True  # save after every evaluation, not only when val loss improves
checkpoint_interval = 0  # iterations between additional saves; 0: save at evaluations only
keep_checkpoints = ''  # iterations whose checkpoints are kept too: '500,1000' -> ckpt_000500.pt, ckpt_001000.pt
# wandb
wandb_log = False  # logs offline where there is no API key
wandb_project = 'gpt2mla'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # a folder of data_dir
data_dir = 'data'
gradient_accumulation_steps = 5 * 8  # micro-batches per iteration, summed over all processes
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence
# model
attention = 'mha'  # 'mha' or 'mla'
n_layer = 12
n_head = 12
n_embd = 768
n_kv_head = 0  # MHA: heads of keys and values; 0: n_head, 1: multi-query, between: grouped-query attention
n_latent = 0  # MLA: size of the latent; 0: half of n_embd
n_latent_q = 0  # MLA: size of the queries' latent; 0: queries are not compressed
n_nope = 0  # MLA: content dimensions per head of queries and keys; 0: the head size
n_value = 0  # MLA: dimensions per head of values; 0: the head size
shared_rope = True  # MLA: one rotated key for all heads; False: keys are decompressed and then rotated whole
latent_norm = False  # MLA: RMSNorm on the latents
latent_init = 'fan_in'  # MLA: initial values of the latents' projections; 'gpt2': as in version 0.1.0
pos = 'learned'  # 'learned', 'rope' or 'none'
n_rope = 0  # dimensions per head that RoPE rotates; 0: all of MHA's, for MLA half of the head size beside the content
rope_theta = 10000.0  # RoPE's base; larger for longer texts
norm = 'layer'  # 'layer' or 'rms'
mlp = 'gelu'  # 'gelu' or 'swiglu'
n_hidden = 0  # width of the MLP; 0: 4 n_embd, of SwiGLU 8/3 n_embd
tied = True  # the output head is the token embedding
init_std = 0.02  # of initial weights; GPT-2's. Small models may learn faster with 1/sqrt(n_embd)
kv_rms = 0.0  # root mean square of keys and values at the start; 0: what the weights' own initial values give
dropout = 0.0  # 0 for pretraining; try 0.1 or more where the data is seen many times
bias = False  # biases in Linear and LayerNorm
flash = True  # the fastest attention; False: the plain formula
recompute = False  # recompute each block in the backward pass (activation checkpointing): less memory, slower
# optimizer
optimizer = 'adamw'  # or 'muon': Muon for the matrices of attention and MLP, AdamW for the rest
learning_rate = 6e-4
kv_lr = 1.0  # learning-rate multiplier for the weights of keys and values
max_iters = 600000
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest gradient norm; 0: no clipping
# learning rate: linear warm-up, then cosine decay
decay_lr = True
warmup_iters = 2000
lr_decay_iters = 600000  # about max_iters (Chinchilla, arXiv:2203.15556)
min_lr = 6e-5  # about a tenth of learning_rate
# machine
backend = 'nccl'  # between GPUs; CPUs always use gloo
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16' (with loss scaling)
compile = 'auto'  # torch.compile: True, False, or 'auto' (on GPUs only)
fsdp = False  # under torchrun: shard parameters, gradients and optimizer over the processes
threads = 0  # CPU threads; 0: as many as the cores that this process may use
seed = 1337  # of initial values, batches and dropout
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())  # leaves `config`, `given`
# ----------------------------------------------------------------------------------------------------------------------

# ---- a new run, or which one to resume -------------------------------------------------------------------------------
folder = RunFolder(out_dir)
if not eval_only:
    check_folder(out_dir)
    if os.path.isdir(out_dir) and is_rank_zero():
        folder.acquire()  # before looking: what is in it must not change any more
settings, resumed_from, resumed = resuming.resolve(config, given, folder)
globals().update(settings)  # from here on a key's one truth is the variable of its name
kept_iterations = set(whole_numbers(keep_checkpoints, 'keep_checkpoints'))


def all_keys():
    return {key: globals()[key] for key in config}  # with their values, as checkpoints and wandb record them


# ---- machine ---------------------------------------------------------------------------------------------------------
processes, place, cores, compiles = start(device, backend, threads, compile)
kind, micro_steps = place.split(':')[0], processes.share_of(gradient_accumulation_steps, 'gradient_accumulation_steps')
rows_per_iter = gradient_accumulation_steps * batch_size
if not processes.agree(-1 if resumed is None else resumed.get('iter_num') or 0):
    raise UserError(f'the processes find different checkpoints in {out_dir}; it must be one folder that all nodes see')

# ---- data and model --------------------------------------------------------------------------------------------------
try:
    if resumed or init_from != 'scratch':
        raw_model, data, shape = resuming.trained_model(all_keys(), given, place, resumed, resumed_from)
        globals().update(shape)
    else:
        data = TokenData(os.path.join(data_dir, dataset), block_size)
        model_class, config_class = models.KINDS[attention]
        sizes = {field.name: globals()[field.name] for field in fields(config_class) if field.name in config}
        raw_model = model_class(config_class(**{**sizes, 'vocab_size': data.padded_vocab_size}), seed)
except ValueError as error:
    raise UserError(str(error)) from error
wandb_run = None
if wandb_log and processes.rank == 0 and not eval_only:
    wandb_run = start_wandb(wandb_project, wandb_run_name, all_keys(), (resumed or {}).get('wandb_run_id'))
wandb_run_id = wandb_run.id if wandb_run else (resumed or {}).get('wandb_run_id')
dtype = processes.agreed_dtype(machine.pick_dtype(dtype, place, n_embd))  # recorded: a trial may have chosen it
autocast = machine.autocast(place, dtype)
sharded = fsdp and processes.world_size > 1
if sharded:
    shard(raw_model, place, compiles)
raw_model.to(place)
model = torch.compile(raw_model) if compiles and not sharded else raw_model
if processes.world_size > 1 and not sharded:
    model = DistributedDataParallel(model, device_ids=[torch.device(place).index] if kind == 'cuda' else None)

# ---- optimizer -------------------------------------------------------------------------------------------------------
# matrices decay, biases and norm gains don't; the weights of keys and values may have a learning rate of their own
rules = resuming.learning_rules(raw_model, all_keys(), resumed)
slow = {name: slice(*rows) for name, rows in rules['slow_rows'].items()}
groups = optimizers.param_groups(raw_model.named_parameters(), weight_decay, slow, kv_lr)
parts = raw_model.parts if rules['divides'] else optimizers.no_parts
optim = optimizers.OPTIMIZERS[optimizer](groups, learning_rate, (beta1, beta2), kind, parts)
optimizers.slow_down(optim, raw_model.named_parameters(), slow, kv_lr)
scaler = torch.amp.GradScaler(kind, enabled=dtype == 'float16')

iter_num, tokens, val_loss, best_val_loss = resuming.restore(optim, scaler, raw_model, resumed, resumed_from)
recorded = all_keys() if eval_only else resuming.keys_to_record(all_keys(), resumed)  # a finished run's stay its own
resumed = None  # frees its tensors

tokens_per_iter = rows_per_iter * block_size
label = models.label_of(raw_model.config)
notice(f'device={place} ({cores} CPU threads, {processes.count()}), dtype={dtype}, compile={compiles}')
notice(f'model: {label}, {raw_model.get_num_params() / 1e6:.2f}M parameters')
notice(f'corpus: {data.corpus} ({data.tokens["train"]:,} training tokens); {tokens_per_iter:,} tokens per iteration')


# ---- the parts of an iteration ---------------------------------------------------------------------------------------
def micro_batches(iteration):
    """This process's micro-batches from `iteration` on, without end: (x, y), each (batch_size, block_size)."""
    while True:
        for micro_step in range(micro_steps):
            first = (micro_step * processes.world_size + processes.rank) * batch_size
            batch = data.batch(seed, iteration, rows_per_iter, slice(first, first + batch_size))
            yield machine.to_device(*batch, place)
        iteration += 1


def get_lr(iteration):
    """Linear warm-up over warmup_iters, then a half cosine from learning_rate down to min_lr at lr_decay_iters."""
    if not decay_lr:
        return learning_rate
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    progress = min(1.0, (iteration - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def evaluate(split):
    """Mean loss over the split's fixed windows, in nats per token, and its standard error; all processes share them."""
    losses = evaluation.window_losses(raw_model, data, split, eval_iters * batch_size, batch_size, autocast, processes)
    return evaluation.mean_and_stderr(losses, processes)


if eval_only:
    for split in ('train', 'val'):
        mean, error = evaluate(split)
        if processes.rank == 0:
            print(f'step {iter_num}: {split} loss {mean:.4f} +- {error:.4f}')
    processes.exit()

log = None
if processes.rank == 0:
    folder.begin(resumes=resumed_from is not None, overwrite=overwrite)
    log = RunLog(folder.log, iter_num, wandb_run)
saver = Writer(writes=processes.rank == 0)
saved_iter = iter_num if resumed_from else None
first_bad = torch.full((), max_iters, device=place)  # first iteration whose loss or gradient was not finite, if any


def save(best=False):
    """Save iteration iter_num in the background. Rank 0 writes; a sharded model is gathered by all processes."""
    if processes.rank == 0 or sharded:
        folder.follow()
        checkpoint = {
            **models.entries(raw_model),  # 'model', 'model_args' and 'attention'
            'optimizer': optim.state_dict(),
            'learning': rules,
            'scaler': scaler.state_dict(),
            'iter_num': iter_num,
            'tokens': tokens,
            'val_loss': val_loss,
            'best_val_loss': best_val_loss,
            'config': recorded,
            'tokenizer': data.meta,
            'corpus': data.corpus,
            'wandb_run_id': wandb_run_id,
        }
        kept = [folder.kept(iter_num)] if iter_num in kept_iterations else []
        saver.save(folder.ckpt, checkpoint, [folder.best, *kept] if best else kept)


def stop_unless_finite(*losses):
    """UserError if `losses`, or loss or gradient of an iteration so far, are not finite: such a run never recovers."""
    finite = all(map(math.isfinite, losses))
    bad = processes.min(int(first_bad) if finite else min(int(first_bad), iter_num))
    if bad < max_iters or not finite:
        saver.wait()
        kept = f'the last checkpoint is of iteration {saved_iter}' if saved_iter is not None else 'nothing was saved'
        hint = 'Lower --learning_rate, raise --warmup_iters, or use --dtype=bfloat16 or float32'
        raise UserError(f'loss or gradient were not finite in iteration {bad}; {kept}. {hint}')


# ---- the loop --------------------------------------------------------------------------------------------------------
bar = tqdm(desc=label, total=max_iters, initial=iter_num, unit='it', disable=None if processes.rank == 0 else True)
measured_from, measured_iters = time.perf_counter(), 0
raw_model.train()
if resumed_from and iter_num < max_iters:
    notice(f'learning rate: {get_lr(iter_num):.3g} now, {get_lr(max_iters - 1):.3g} at the end')
batches = micro_batches(iter_num)
x, y = next(batches)
while True:
    lr = get_lr(iter_num)
    row, improved = {}, False
    done = iter_num >= max_iters
    evaluates = done or iter_num % eval_interval == 0
    if evaluates:
        started = time.perf_counter()
        train_loss, _ = evaluate('train')
        val_loss, val_stderr = evaluate('val')
        stop_unless_finite(train_loss, val_loss)
        row = dict(train_loss=train_loss, val_loss=val_loss, val_stderr=val_stderr)
        if processes.rank == 0:
            losses = f'train loss {train_loss:.4f}, val loss {val_loss:.4f} +- {val_stderr:.4f}'
            tqdm.write(f'step {iter_num}: {losses}', sys.stdout)
        # not '<': a run killed between writing ckpt.pt and ckpt_best.pt resumes here with an equal loss
        improved, best_val_loss = val_loss <= best_val_loss, min(val_loss, best_val_loss)
        measured_from += time.perf_counter() - started

    # whether to save these weights, and whether to stop: asked to, or done
    stops = not done and processes.any(stop_request.signal or (log and log.error))
    if iter_num == 0:  # initial values are saved only where that was asked for
        saves = stops or 0 in kept_iterations
    else:
        wanted = evaluates and (always_save_checkpoint or improved)
        due = checkpoint_interval and iter_num % checkpoint_interval == 0
        saves = stops or wanted or due or iter_num in kept_iterations
    if done:
        if saves:
            save(best=improved)
        elif saved_iter != iter_num:
            reason = 'it is no improvement' if iter_num else 'nothing was trained'
            notice(f'iteration {iter_num} is not saved: {reason}')
        break

    for group in optim.param_groups:
        group['lr'] = lr * group.get('lr_scale', 1.0)
    loss = torch.zeros((), device=place)
    for micro_step in range(micro_steps):
        if dropout:
            seed_dropout(seed, iter_num, micro_step, processes.rank)
        # gradients are averaged over the processes once, in the last micro-step; shards have no room to accumulate
        alone = processes.world_size == 1 or sharded or micro_step == micro_steps - 1
        with nullcontext() if alone else model.no_sync():
            with autocast:
                micro_loss = model(x, y, logits=False)[1] / micro_steps
            loss += micro_loss.detach()
            x, y = next(batches)  # while a GPU is still busy with the forward pass
            scaler.scale(micro_loss).backward()
    scaler.unscale_(optim)
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    grad_norm = grad_norm.full_tensor() if sharded else grad_norm
    # a gradient that overflows float16 says nothing about the weights: the scaler skips the step and lowers the scale
    finite = loss.isfinite() & (grad_norm.isfinite() | scaler.is_enabled())
    first_bad = torch.where(finite | (first_bad < iter_num), first_bad, iter_num)
    if saves:  # before the step: the loss and gradient of these very weights are known now
        stop_unless_finite()
        save(best=improved)
        saved_iter = iter_num
    if stops:
        break
    scaler.step(optim)
    scaler.update()
    optim.zero_grad(set_to_none=True)
    measured_iters += 1

    if iter_num % log_interval == 0 or evaluates:
        mean_loss = processes.sum(loss.cpu().double()).item() / processes.world_size  # waits for the device
        seconds = (time.perf_counter() - measured_from) / measured_iters
        peak = (peak_flops(place, dtype) or 0) * processes.world_size
        mfu = raw_model.flops_per_token() * tokens_per_iter / seconds / peak if peak else None
        row.update(iter=iter_num, tokens=tokens, lr=lr, loss=mean_loss, grad_norm=float(grad_norm), mfu=mfu)
        row.update(ms_per_iter=1000 * seconds, tokens_per_s=tokens_per_iter / seconds)
        if processes.rank == 0:
            log.write(row)
            bar.set_postfix_str(f'loss {mean_loss:.4f}, {tokens_per_iter / seconds:,.0f} tokens/s')
            if bar.disable and iter_num % log_interval == 0:
                shown = 'n/a' if mfu is None else f'{100 * mfu:.2f}%'
                print(f'iter {iter_num}: loss {mean_loss:.4f}, time {1000 * seconds:.2f}ms, mfu {shown}', flush=True)
        stop_unless_finite()
        measured_from, measured_iters = time.perf_counter(), 0
    iter_num += 1
    tokens += tokens_per_iter
    bar.update()

# ---- the end: done, or asked to stop ---------------------------------------------------------------------------------
bar.close()
if processes.rank == 0 and done:
    log.write(dict(row, iter=iter_num, tokens=tokens, lr=lr))
saver.wait()
processes.any(False)  # a barrier: torchrun ends the job when one process leaves, and the checkpoint must be on disk
if stops:
    hint = f'Resume with: python {sys.argv[0]} --resume=yes --out_dir={out_dir}'
    reason = stop_request.signal or 'another process'
    notice(f'stopped by {reason} at iteration {iter_num}; {folder.ckpt} is saved. {hint}')
if log:
    log.finish()
    folder.lock.release()
processes.exit(signals.STOPPED if stops else 0)
