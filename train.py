"""
Train a GPT, with multi-head attention or (through train_mla.py) multi-head latent attention. The only training loop.

One process, a small run on a CPU:
$ python train.py config/train_shakespeare_cpu.py

One GPU, or as many processes as there are GPUs, on one node or several:
$ python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
$ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
$ torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/train_gpt2.py

Resume a run that stopped, for whatever reason. Keys that you don't give come from its checkpoint:
$ python train.py --resume=yes --out_dir=out-shakespeare-cpu
$ python train.py config/train_shakespeare_cpu.py --resume=auto  # resumes where there is a run, otherwise starts one
"""

from core.cli import signals

stop_request = signals.StopRequest()  # before the slow imports, so that a signal that arrives during them counts

import math
import os
import sys
import time
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from core.cli import arguments, errors, machine
from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import evaluation
from core.runs import log as runlog
from core.runs import resume as resuming
from core.runs.folder import RunFolder
from core.runs.processes import join_processes, seed_dropout, shard
from core.speed import gpus

# ----------------------------------------------------------------------------------------------------------------------
# output
out_dir = 'out'
init_from = 'scratch'  # or a checkpoint, 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', a Hugging Face folder
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
n_rope = 0  # MLA: dimensions per head that RoPE rotates; 0 with pos='rope': half of the head size
latent_norm = False  # MLA: RMSNorm on the latents
init_std = 0.02  # of initial weights; GPT-2's. Small models may learn faster with 1/sqrt(n_embd)
latent_init = 'fan_in'  # MLA: initial values of the latents' projections; 'gpt2': as in version 0.1.0
pos = 'learned'  # 'learned' or 'rope'
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
    arguments.check_folder(out_dir)
    if os.path.isdir(out_dir) and errors.is_rank_zero():
        folder.acquire()  # before looking: what is in it must not change any more
config, resumed_from, resumed = resuming.resolve(config, given, folder)
globals().update(config)
kept_iterations = set(arguments.whole_numbers(keep_checkpoints, 'keep_checkpoints'))

# ---- machine ---------------------------------------------------------------------------------------------------------
device = machine.pick_device(device)
processes, device = join_processes(device, backend)
threads = machine.set_threads(threads)
if compile is not False:
    machine.keep_compiled()
if device == 'cpu':
    machine.keep_freed_memory()
compile = device.startswith('cuda') if compile == 'auto' else compile
torch.set_float32_matmul_precision('high')  # TF32 for what stays float32 on a GPU
if gradient_accumulation_steps % processes.world_size:
    raise UserError(
        f'gradient_accumulation_steps={gradient_accumulation_steps} micro-batches cannot be divided equally among '
        f'{processes.world_size} processes; make it a multiple of their number'
    )
micro_steps = gradient_accumulation_steps // processes.world_size
rows_per_iter = gradient_accumulation_steps * batch_size

# ---- data, model and optimizer ---------------------------------------------------------------------------------------
raw_model, data = resuming.model_and_data(config, given, device, resumed, resumed_from)
wandb_run = None
if wandb_log and processes.rank == 0 and not eval_only:
    wandb_run = runlog.start_wandb(wandb_project, wandb_run_name, config, (resumed or {}).get('wandb_run_id'))
block_size = raw_model.config.block_size
dtype = config['dtype'] = processes.agreed_dtype(machine.pick_dtype(dtype, device, raw_model.config.n_embd))
autocast = machine.autocast(device, dtype)
fsdp = fsdp and processes.world_size > 1
if fsdp:
    processes.broadcast_model(raw_model)  # a conversion may round differently on each process; DDP broadcasts by itself
    shard(raw_model, device, compile)
raw_model.to(device)
kind = device.split(':')[0]
optimizer = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), kind, optimizer, kv_lr)
scaler = torch.amp.GradScaler(kind, enabled=dtype == 'float16')
iter_num, tokens, val_loss, best_val_loss = 0, 0, None, math.inf
if resumed:
    iter_num, tokens, val_loss, best_val_loss = resuming.progress(resumed)
    if resumed.get('optimizer'):
        checkpoints.restore_optimizer(optimizer, resumed['optimizer'])
    if resumed.get('scaler'):
        scaler.load_state_dict(resumed['scaler'])
    if iter_num >= max_iters and not eval_only:
        errors.notice(f'the run has reached max_iters={max_iters}; to train on, give a higher --max_iters')
        config |= {key: value for key, value in (resumed.get('config') or {}).items() if key in config}  # none applied
if min_lr > learning_rate and decay_lr:
    errors.notice(f'note: min_lr={min_lr:g} is above learning_rate={learning_rate:g}, so the rate rises to it; lower '
                   '--min_lr too')  # fmt: skip
wandb_run_id = wandb_run.id if wandb_run else (resumed or {}).get('wandb_run_id')
resumed = None  # frees its tensors
model = torch.compile(raw_model) if compile and not fsdp else raw_model
if processes.world_size > 1 and not fsdp:
    model = DistributedDataParallel(model, device_ids=[processes.local_rank] if device.startswith('cuda') else None)

tokens_per_iter = rows_per_iter * block_size
errors.notice(
    f'device={device} ({threads} CPU threads, {processes.world_size} process{"es" * (processes.world_size > 1)}), '
    f'dtype={dtype}, compile={compile}\n'
    f'model: {checkpoints.arm_of(raw_model.config)}, {raw_model.get_num_params() / 1e6:.2f}M parameters\n'
    f'corpus: {data.corpus} ({data.tokens["train"]:,} training tokens); {tokens_per_iter:,} tokens per iteration'
)


# ---- the parts of an iteration ---------------------------------------------------------------------------------------
def micro_batches(iteration):
    """This process's micro-batches from `iteration` on, without end: (x, y), each (batch_size, block_size)."""
    while True:
        for micro_step in range(micro_steps):
            first = (micro_step * processes.world_size + processes.rank) * batch_size
            batch = data.batch(seed, iteration, rows_per_iter, slice(first, first + batch_size))
            yield machine.to_device(*batch, device)
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


def stop_unless_finite(*losses):
    """
    UserError if `losses`, or the loss or gradient of an iteration so far, are not finite; the same on all processes.

    Such a run never recovers, and its weights must not reach a checkpoint.
    """
    bad = processes.min(min(int(first_bad), max_iters if all(map(math.isfinite, losses)) else iter_num))
    if bad < max_iters or not all(map(math.isfinite, losses)):
        saver.wait()
        kept = f'the last checkpoint is of iteration {saved_iter}' if saved_iter is not None else 'nothing was saved'
        raise UserError(f'loss or gradient were not finite in iteration {bad}; {kept}. Lower --learning_rate, raise '
                        '--warmup_iters, or use --dtype=bfloat16 or float32')  # fmt: skip


def save(best=False):
    """Save iteration iter_num in the background. Rank 0 writes; a sharded model is gathered by all processes."""
    if processes.rank == 0 or fsdp:
        state = checkpoints.contents(
            raw_model, config, optimizer=optimizer, iter_num=iter_num, best_val_loss=best_val_loss, val_loss=val_loss,
            tokenizer=data.meta, corpus=data.corpus, tokens=tokens, scaler=scaler, wandb_run_id=wandb_run_id,
        )  # fmt: skip
        others = [folder.best] * best + [folder.kept(iter_num)] * (iter_num in kept_iterations)
        saver.save(folder.ckpt, state, others)


if eval_only:
    for split in ('train', 'val'):
        mean, error = evaluate(split)
        if processes.rank == 0:
            print(f'step {iter_num}: {split} loss {mean:.4f} +- {error:.4f}')
    processes.exit()

# ---- the loop --------------------------------------------------------------------------------------------------------
log = None
if processes.rank == 0:
    folder.acquire()
    if resumed_from is None and overwrite:
        folder.clear()
    elif resumed_from is None:
        folder.set_log_aside()
    log = runlog.RunLog(folder.log, iter_num, wandb_run)
saver = checkpoints.Writer(writes=processes.rank == 0)
saved_iter = iter_num if resumed_from else None
bar = tqdm(desc=checkpoints.arm_of(raw_model.config), total=max_iters, initial=iter_num, unit='it',
           disable=None if processes.rank == 0 else True)  # fmt: skip
first_bad = torch.full((), max_iters, device=device)  # first iteration whose loss or gradient was not finite, if any
measured_from, measured_iters = time.perf_counter(), 0
raw_model.train()
if resumed_from and iter_num < max_iters:
    errors.notice(f'learning rate: {get_lr(iter_num):.3g} now, {get_lr(max_iters - 1):.3g} at the end')
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
        row = dict(train_loss=f'{train_loss:.6f}', val_loss=f'{val_loss:.6f}', val_stderr=f'{val_stderr:.6f}')
        if processes.rank == 0:
            tqdm.write(
                f'step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f} +- {val_stderr:.4f}', sys.stdout
            )
        # not '<': a run killed between writing ckpt.pt and ckpt_best.pt resumes here with an equal loss
        improved, best_val_loss = val_loss <= best_val_loss, min(val_loss, best_val_loss)
        measured_from += time.perf_counter() - started
    stops = not done and processes.any(stop_request.signal or (log and log.error))
    saves = stops or iter_num in kept_iterations
    if iter_num:  # initial values are saved only where that was asked for
        saves |= evaluates and (always_save_checkpoint or improved)
        saves |= bool(checkpoint_interval) and iter_num % checkpoint_interval == 0
    if done:
        if saves:
            save(best=improved)
        elif saved_iter != iter_num:
            errors.notice(f'always_save_checkpoint=False: iteration {iter_num} is no improvement and is not saved')
        break

    for group in optimizer.param_groups:
        group['lr'] = lr
    loss = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        if dropout:
            seed_dropout(seed, iter_num, micro_step, processes.rank)
        # gradients are averaged over the processes once, in the last micro-step; shards have no room to accumulate
        alone = processes.world_size == 1 or fsdp or micro_step == micro_steps - 1
        with nullcontext() if alone else model.no_sync():
            with autocast:
                micro_loss = model(x, y, logits=False)[1] / micro_steps
            loss += micro_loss.detach()
            x, y = next(batches)  # while a GPU is still busy with the forward pass
            scaler.scale(micro_loss).backward()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    grad_norm = grad_norm.full_tensor() if fsdp else grad_norm
    # a gradient that overflows float16 says nothing about the weights: the scaler skips the step and lowers the scale
    finite = loss.isfinite() & (grad_norm.isfinite() | scaler.is_enabled())
    first_bad = torch.where(finite | (first_bad < iter_num), first_bad, iter_num)
    if saves:  # before the step: the loss and gradient of these very weights are known now
        stop_unless_finite()
        save(best=improved)
        saved_iter = iter_num
    if stops:
        break
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    measured_iters += 1

    if iter_num % log_interval == 0 or evaluates:
        mean_loss = processes.sum(loss.cpu().double()).item() / processes.world_size  # waits for the device
        seconds = (time.perf_counter() - measured_from) / measured_iters
        peak = (gpus.peak_flops(device, dtype) or 0) * processes.world_size
        mfu = raw_model.estimate_mfu(rows_per_iter, seconds, peak)
        row.update(
            iter=iter_num, tokens=tokens, lr=f'{lr:.6g}', loss=f'{mean_loss:.6f}', grad_norm=f'{float(grad_norm):.6f}',
            ms_per_iter=f'{1000 * seconds:.2f}', tokens_per_s=f'{tokens_per_iter / seconds:.0f}',
            mfu='' if mfu is None else f'{mfu:.4f}',
        )  # fmt: skip
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
    log.write(dict(row, iter=iter_num, tokens=tokens, lr=f'{lr:.6g}'))
saver.wait()
processes.any(False)  # a barrier: torchrun ends the job when one process leaves, and the checkpoint must be on disk
if stops:
    errors.notice(
        f'stopped by {stop_request.signal or "another process"} at iteration {iter_num}; {folder.ckpt} is saved. '
        f'Resume with: python {sys.argv[0]} --resume=yes --out_dir={out_dir}'
    )
if log:
    log.finish()
    folder.release()
processes.exit(signals.STOPPED if stops else 0)
