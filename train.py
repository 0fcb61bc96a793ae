"""
Train a GPT, with multi-head attention or (through train_mla.py) multi-head latent attention. The only training loop.

One process, a small run on a CPU:
$ python train.py config/train_shakespeare_cpu.py

One GPU, or as many processes as there are GPUs, on one node or several:
$ python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
$ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
$ torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/train_gpt2.py

Resume a run that stopped, for whatever reason (or pass --init_from=auto from the start):
$ python train.py config/train_shakespeare_cpu.py --init_from=resume
"""

import math
import os
import sys
import time
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from core import checkpoint as checkpoints
from core import evaluation, runlog, runtime
from core.dataset import TokenData
from core.runtime import UserError

# ----------------------------------------------------------------------------------------------------------------------
# output
out_dir = 'out'
init_from = 'scratch'  # or 'resume', 'auto' (resume where a run exists), a checkpoint, 'gpt2*', a Hugging Face folder
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
n_latent = 0  # MLA: size of the latent; 0: half of n_embd
n_latent_q = 0  # MLA: size of the queries' latent; 0: queries are not compressed
n_rope = 0  # MLA: dimensions per head that RoPE rotates; 0 with pos='rope': half of the head size
latent_norm = False  # MLA: RMSNorm on the latents
pos = 'learned'  # 'learned' or 'rope'
dropout = 0.0  # 0 for pretraining; try 0.1 or more where the data is seen many times
bias = False  # biases in Linear and LayerNorm
flash = True  # the fastest attention; False: the plain formula
recompute = False  # recompute each block in the backward pass (activation checkpointing): less memory, slower
# AdamW
learning_rate = 6e-4
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
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# ----------------------------------------------------------------------------------------------------------------------

stop_request = runtime.StopRequest()

if overwrite and init_from in ('resume', 'auto'):
    raise UserError(f'overwrite=True starts a new run, init_from={init_from} resumes an old one; leave one of them out')
if attention == 'mha' and (n_latent or n_latent_q or n_rope or latent_norm):
    raise UserError('n_latent, n_latent_q, n_rope and latent_norm belong to MLA; use train_mla.py, or leave them out')
kept_iterations = set(runtime.whole_numbers(keep_checkpoints, 'keep_checkpoints'))

# ---- machine ---------------------------------------------------------------------------------------------------------
device = runtime.pick_device(device)
processes, device = runtime.join_processes(device, backend)
threads = runtime.set_threads(threads)
if compile is not False:
    runtime.keep_compiled()
if device == 'cpu':
    runtime.keep_freed_memory()
compile = device.startswith('cuda') if compile == 'auto' else compile
torch.set_float32_matmul_precision('high')  # TF32 for what stays float32 on a GPU
if gradient_accumulation_steps % processes.world_size:
    raise UserError(
        f'gradient_accumulation_steps={gradient_accumulation_steps} micro-batches cannot be divided equally among '
        f'{processes.world_size} processes; make it a multiple of their number'
    )
micro_steps = gradient_accumulation_steps // processes.world_size
rows_per_iter = gradient_accumulation_steps * batch_size
tokens_per_iter = rows_per_iter * block_size

# ---- data, and the run so far ----------------------------------------------------------------------------------------
ckpt_path, best_path = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'ckpt_best.pt')
if not eval_only:
    runtime.check_folder(out_dir)
data = TokenData(os.path.join(data_dir, dataset), block_size)
if init_from == 'auto':
    init_from = config['init_from'] = 'resume' if os.path.exists(ckpt_path) else 'scratch'
resumed = checkpoints.load(ckpt_path) if init_from == 'resume' else None
if dtype == 'auto' and device == 'cpu' and resumed and 'attention' in resumed:
    dtype = resumed['config'].get('dtype', dtype)  # on a CPU a resumed run keeps its dtype
dtype = config['dtype'] = processes.agreed_dtype(runtime.pick_dtype(dtype, device, n_embd))
autocast = runtime.autocast(device, dtype)
if resumed is None and os.path.exists(ckpt_path) and not overwrite and not eval_only:
    raise UserError(f'{out_dir} holds another run; resume it with --init_from=resume, choose another --out_dir, '
                    'or discard it with --overwrite=True')  # fmt: skip
wandb_run = None
if wandb_log and processes.rank == 0 and not eval_only:
    wandb_run = runlog.start_wandb(wandb_project, wandb_run_name, config, (resumed or {}).get('wandb_run_id'))

# ---- model and optimizer ---------------------------------------------------------------------------------------------
raw_model = checkpoints.starting_model(config, data, device, resumed, ckpt_path)
fsdp = fsdp and processes.world_size > 1
if fsdp:
    runtime.shard(raw_model, device, compile)
raw_model.to(device)
optimizer = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device.split(':')[0])
scaler = torch.amp.GradScaler(device.split(':')[0], enabled=dtype == 'float16')
iter_num, best_val_loss = 0, 1e9
if resumed:
    iter_num, best_val_loss = resumed.get('iter_num', 0), float(resumed.get('best_val_loss', 1e9))
    if resumed.get('optimizer'):
        checkpoints.restore_optimizer(optimizer, resumed['optimizer'])
    if resumed.get('scaler'):
        scaler.load_state_dict(resumed['scaler'])
wandb_run_id = wandb_run.id if wandb_run else (resumed or {}).get('wandb_run_id')
resumed = None  # frees its tensors
model = torch.compile(raw_model) if compile and not fsdp else raw_model
if processes.world_size > 1 and not fsdp:
    model = DistributedDataParallel(model, device_ids=[processes.local_rank] if device.startswith('cuda') else None)

runtime.notice(
    f'device={device} ({threads} CPU threads, {processes.world_size} process{"es" * (processes.world_size > 1)}), '
    f'dtype={dtype}, compile={compile}; {attention}, {raw_model.get_num_params() / 1e6:.2f}M parameters\n'
    f'corpus: {data.corpus} ({data.tokens["train"]:,} training tokens); {tokens_per_iter:,} tokens per iteration'
)


# ---- the parts of an iteration ---------------------------------------------------------------------------------------
def micro_batches(iteration):
    """This process's micro-batches from `iteration` on, without end: (x, y), each (batch_size, block_size)."""
    while True:
        for micro_step in range(micro_steps):
            first = (micro_step * processes.world_size + processes.rank) * batch_size
            batch = data.batch(seed, iteration, rows_per_iter, slice(first, first + batch_size))
            yield runtime.to_device(*batch, device)
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


def kept_path(iteration):
    """Where the checkpoint of an iteration named by keep_checkpoints is kept."""
    return os.path.join(out_dir, f'ckpt_{iteration:06}.pt')


def save(best=False):
    """Save iteration iter_num in the background. Rank 0 writes; a sharded model is gathered by all processes."""
    if processes.rank == 0 or fsdp:
        state = checkpoints.contents(
            raw_model, config, optimizer=optimizer, iter_num=iter_num, best_val_loss=best_val_loss, val_loss=val_loss,
            tokenizer=data.meta, corpus=data.corpus, scaler=scaler, wandb_run_id=wandb_run_id,
        )  # fmt: skip
        others = [best_path] * best + [kept_path(iter_num)] * (iter_num in kept_iterations)
        saver.save(ckpt_path, state, others)


def stop_if_not_finite():
    """A run whose loss is not finite never recovers, and its weights must not reach a checkpoint."""
    if (bad := processes.min(int(first_bad))) < max_iters:
        saver.wait()
        raise UserError(f'the loss was not finite in iteration {bad}; the last checkpoint in {out_dir} is from before. '
                        'Lower --learning_rate, raise --warmup_iters, or use --dtype=bfloat16 or float32')  # fmt: skip


if eval_only:
    for split in ('train', 'val'):
        mean, error = evaluate(split)
        if processes.rank == 0:
            print(f'step {iter_num}: {split} loss {mean:.4f} +- {error:.4f}')
    processes.exit()

# ---- the loop --------------------------------------------------------------------------------------------------------
log = None
if processes.rank == 0:
    os.makedirs(out_dir, exist_ok=True)
    if not iter_num:
        # discarded by --overwrite: --init_from=auto must not find it again
        for path in (ckpt_path, best_path, *map(kept_path, kept_iterations)):
            if os.path.exists(path):
                os.remove(path)
    log = runlog.RunLog(os.path.join(out_dir, 'log.csv'), iter_num, wandb_run)
saver = checkpoints.Writer(writes=processes.rank == 0)
bar = tqdm(total=max_iters, initial=iter_num, unit='it', disable=None if processes.rank == 0 else True)
val_loss = None
first_bad = torch.full((), max_iters, device=device)  # the first iteration whose loss was not finite, if there is one
measured_from, measured_iters = time.perf_counter(), 0
raw_model.train()
batches = micro_batches(iter_num)
x, y = next(batches)
while True:
    lr = get_lr(iter_num)
    row = {}
    if iter_num % eval_interval == 0 or iter_num == max_iters:
        stop_if_not_finite()
        started = time.perf_counter()
        train_loss, _ = evaluate('train')
        val_loss, val_stderr = evaluate('val')
        row = dict(train_loss=f'{train_loss:.6f}', val_loss=f'{val_loss:.6f}', val_stderr=f'{val_stderr:.6f}')
        if processes.rank == 0:
            tqdm.write(
                f'step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f} +- {val_stderr:.4f}', sys.stdout
            )
        # not '<': a run killed between writing ckpt.pt and ckpt_best.pt resumes here with an equal loss
        improved, best_val_loss = val_loss <= best_val_loss, min(val_loss, best_val_loss)
        if iter_num and (always_save_checkpoint or improved or iter_num in kept_iterations):
            save(best=improved)
        measured_from += time.perf_counter() - started
    elif iter_num in kept_iterations or (iter_num and checkpoint_interval and iter_num % checkpoint_interval == 0):
        stop_if_not_finite()
        save()
    if iter_num >= max_iters or processes.any(stop_request.signal):
        break

    for group in optimizer.param_groups:
        group['lr'] = lr
    loss = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        if dropout:
            runtime.seed_dropout(seed, iter_num, micro_step, processes.rank)
        # gradients are averaged over the processes once, in the last micro-step; shards have no room to accumulate
        alone = processes.world_size == 1 or fsdp or micro_step == micro_steps - 1
        with nullcontext() if alone else model.no_sync():
            with autocast:
                micro_loss = model(x, y, logits=False)[1] / micro_steps
            loss += micro_loss.detach()
            x, y = next(batches)  # while a GPU is still busy with the forward pass
            scaler.scale(micro_loss).backward()
    grad_norm = None
    if grad_clip:
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip)
        grad_norm = grad_norm.full_tensor() if fsdp else grad_norm
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    first_bad = torch.where(loss.isfinite() | (first_bad < iter_num), first_bad, iter_num)
    measured_iters += 1

    if iter_num % log_interval == 0 or row:
        mean_loss = processes.sum(loss.double().cpu()).item() / processes.world_size  # waits for the device
        seconds = (time.perf_counter() - measured_from) / measured_iters
        peak = (runtime.peak_flops(device, dtype) or 0) * processes.world_size
        mfu = raw_model.estimate_mfu(rows_per_iter, seconds, peak)
        row.update(
            iter=iter_num, tokens=iter_num * tokens_per_iter, lr=f'{lr:.6g}', loss=f'{mean_loss:.6f}',
            grad_norm='' if grad_norm is None else f'{float(grad_norm):.6f}', ms_per_iter=f'{1000 * seconds:.2f}',
            tokens_per_s=f'{tokens_per_iter / seconds:.0f}', mfu='' if mfu is None else f'{mfu:.4f}',
        )  # fmt: skip
        if processes.rank == 0:
            log.write(row)
            bar.set_postfix_str(f'loss {mean_loss:.4f}, {tokens_per_iter / seconds:,.0f} tokens/s')
            if bar.disable and iter_num % log_interval == 0:
                shown = 'n/a' if mfu is None else f'{100 * mfu:.2f}%'
                print(f'iter {iter_num}: loss {mean_loss:.4f}, time {1000 * seconds:.2f}ms, mfu {shown}', flush=True)
        stop_if_not_finite()
        measured_from, measured_iters = time.perf_counter(), 0
    iter_num += 1
    bar.update()

# ---- the end: all done, or asked to stop -----------------------------------------------------------------------------
bar.close()
stopped_early = iter_num < max_iters
if stopped_early:
    stop_if_not_finite()
    save()
elif processes.rank == 0 and row:
    log.write(dict(row, iter=iter_num, tokens=iter_num * tokens_per_iter, lr=f'{lr:.6g}'))
saver.wait()
processes.any(False)  # torchrun ends the job when one process leaves: none may, before the checkpoint is on disk
if log:
    log.finish()
if stopped_early:
    runtime.notice(
        f'stopped by {stop_request.signal or "another process"} at iteration {iter_num}; {ckpt_path} is saved, '
        'resume with --init_from=resume'
    )
processes.exit(runtime.PREEMPTED if stopped_early else 0)
