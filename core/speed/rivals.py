"""
What is timed against us: nanoGPT, Hugging Face's GPT-2, and our own steps without one optimization.

- another program's model gets our weights and must give our logits: times of different computations can't be compared
- what changes the allocator or a library's state runs in a separate process, which is this file as a program:

    python -m core.speed.rivals '{"setting": {...}, ...}'

It reads 'run' or 'peak_bytes' per line of stdin and writes the result as a line of JSON to stdout; a str says what is
wrong. SeparateTraining starts it and is the only one that talks to it.
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.cli import machine
from core.cli.errors import UserError, report_user_errors
from core.convert.gpt2 import hf_settings, to_gpt2
from core.runs.models import NANOGPT_ARGS
from core.speed import timing
from core.text.dataset import TokenData
from core.text.tokenizer import GPT2Tokenizer
from model import GPT, GPTConfig
from ops.decoding import FixedStep
from ops.kernels import keep_casts
from ops.optimizers import adamw, param_groups

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = {
    'memory': 'freed memory returns to the system',
    'fused': 'AdamW loops over tensors',
    'loss': 'all logits are computed at once',
}

# ---- other programs' models, with our weights ------------------------------------------------------------------------


def nanogpt_model(folder: str, ours: GPT, prompt: torch.Tensor) -> torch.nn.Module:
    """
    nanoGPT's GPT with the weights of `ours`, in eval mode and on its device, from the model.py in `folder`.

    ours: a GPT in eval mode; prompt: token ids (B, T) for the comparison of logits. UserError where `folder` has no
    model.py, and where the logits differ.
    """
    file = os.path.join(folder, 'model.py')
    if not os.path.isfile(file):
        raise UserError(f'{file} is missing; --nanogpt must be the folder of a nanoGPT checkout')
    spec = importlib.util.spec_from_file_location('nanogpt_model', file)
    assert spec and spec.loader  # for a file that exists
    module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = {name: getattr(ours.config, name) for name in NANOGPT_ARGS}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        theirs = module.GPT(module.GPTConfig(**settings))
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.eval().to(prompt.device)
    check_logits(theirs, ours, prompt, 'nanoGPT')
    return theirs


def huggingface_model(ours: GPT, prompt: torch.Tensor) -> Any:
    """
    transformers' GPT2LMHeadModel with the weights of `ours`, in eval mode and on its device.

    ours: a GPT in eval mode; biases that it lacks become zeros. prompt: token ids (B, T) for the comparison of logits.
    UserError where transformers is not installed, and where the logits differ.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError('--huggingface requires transformers: pip install transformers') from None
    # without an end-of-text id: generate would compare every token with it
    theirs = GPT2LMHeadModel(GPT2Config(**hf_settings(ours.config), bos_token_id=None, eos_token_id=None))
    theirs.load_state_dict(to_gpt2(ours.state_dict()))
    theirs = theirs.eval().to(prompt.device)
    check_logits(lambda idx: (theirs(idx).logits[:, -1:],), ours, prompt, 'transformers')
    return theirs


@torch.no_grad()
def check_logits(theirs: Callable, ours: GPT, prompt: torch.Tensor, name: str) -> None:
    """UserError unless both models, called with prompt (B, T), return equal logits (B, 1, V) of the last position."""
    logits, expected = theirs(prompt)[0], ours(prompt)[0]
    # the tolerance leaves room for bfloat16's rounding; NaN fails
    if not (logits - expected).abs().max() <= 1e-2 * expected.abs().max():
        raise UserError(f"{name}'s logits differ from ours for the same weights; compare with an unmodified version")


# ---- data to read ----------------------------------------------------------------------------------------------------


def random_data(folder: str, vocab_size: int, block_size: int, seed: int) -> None:
    """Write a data set of random token ids to `folder`, without meta.json: in nanoGPT's format for GPT-2's ids."""
    ids, size = min(vocab_size, GPT2Tokenizer.n_vocab), max(2**20, 2 * block_size)
    tokens = np.random.default_rng(seed).integers(ids, size=size, dtype=np.uint16)
    for split in ('train', 'val'):
        tokens.tofile(os.path.join(folder, f'{split}.bin'))


# ---- steps to be timed -----------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """How every contender takes its steps."""

    data: str  # absolute path of the data set's folder
    batch_size: int
    block_size: int
    seed: int
    device: str
    dtype: str
    compile: bool


class Training:
    """Training steps of a model, as train.py takes them: batch, forward, backward, clipping, AdamW."""

    def __init__(self, model: GPT, setting: Setting, leave_out: str = ''):
        """leave_out: a name in WITHOUT."""
        self.model, self.setting, self.iteration = model.train(), setting, 0
        groups = param_groups(model.named_parameters(), 0.1)
        self.optimizer = adamw(groups, 1e-3, (0.9, 0.95), setting.device.split(':')[0])
        if leave_out == 'fused':
            groups = [{k: group[k] for k in ('params', 'weight_decay')} for group in self.optimizer.param_groups]
            self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
        self.call = torch.compile(model) if setting.compile else model
        self.arguments = {'logits': leave_out == 'loss'}
        self.dtype = setting.dtype
        self.data: Any = TokenData(setting.data, setting.block_size)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch (x, y) on the CPU, each int64 (batch_size, block_size)."""
        size = self.setting.batch_size
        return self.data.batch(self.setting.seed, self.iteration, size, slice(0, size))

    def run(self) -> None:
        """One step."""
        x, y = machine.to_device(*self.batch(), self.setting.device)
        with machine.autocast(self.setting.device, self.dtype):
            loss = self.call(x, y, **self.arguments)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.iteration += 1

    def peak_bytes(self) -> int:
        """Peak memory of one step, in bytes."""
        return timing.peak_bytes(self.run, self.setting.device)


class NanoGPTTraining(Training):
    """Training steps of nanoGPT's model, with its optimizer and its batches, as its train.py takes them."""

    def __init__(self, model: Any, setting: Setting):
        super().__init__(model, setting)
        self.arguments = {}  # it has no `logits`
        self.dtype = setting.dtype if setting.device.startswith('cuda') else 'float32'  # it has no autocast on a CPU
        self.data = np.memmap(os.path.join(setting.data, 'train.bin'), dtype=np.uint16, mode='r')

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A random batch, gathered row by row as in nanoGPT's get_batch."""
        length = self.setting.block_size
        starts = torch.randint(len(self.data) - length, (self.setting.batch_size,)).tolist()
        rows = [self.data[i : i + length + 1].astype(np.int64) for i in starts]
        x, y = (torch.stack([torch.from_numpy(row[part]) for row in rows]) for part in (slice(-1), slice(1, None)))
        return x, y


class SeparateTraining:
    """
    Training steps in a separate process: their effect on allocator and libraries doesn't reach the other contenders.

    A context manager: leaving it ends the process. Every method raises UserError where the process fails.
    """

    def __init__(self, name: str, setting: Setting, config: GPTConfig, leave_out: str = '', nanogpt: str = ''):
        """nanogpt: the folder of a nanoGPT checkout; '': our model."""
        folder, precision = nanogpt and os.path.abspath(nanogpt), torch.get_float32_matmul_precision()
        task: dict[str, Any] = dict(setting=asdict(setting), config=asdict(config), leave_out=leave_out, nanogpt=folder)
        task |= dict(threads=torch.get_num_threads(), precision=precision)
        command, pipe = [sys.executable, '-m', 'core.speed.rivals', json.dumps(task)], subprocess.PIPE
        self.name = name
        self.process: Any = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self):
        self.run()  # returns when the process is ready
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def ask(self, question: str) -> Any:
        """What the process answers to the name of a method of Training."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(question + '\n')
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else 'its process ended, with the error above'
        if isinstance(answer, str):
            raise UserError(f"{self.name} can't be measured: {answer}")
        return answer

    def run(self) -> None:
        """One step."""
        self.ask('run')

    def peak_bytes(self) -> int:
        """Peak memory of one step, in bytes."""
        return self.ask('peak_bytes')


class Decoding:
    """Decoding steps of a model at a fixed context length: every step writes the same last position of its cache."""

    def __init__(self, model: GPT, batch_size: int, context: int, kind: str = 'float', how: str = 'captured'):
        """kind: of the cache. how: 'captured' as a CUDA graph on a GPU, 'compiled' by torch.compile, or 'eager'."""
        self.model, self.context = model, context
        self.cache = model.init_cache(batch_size, context, kind=kind)
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.transformer.wte.weight.device)
        self.step: Callable = functools.partial(model, cache=self.cache)
        self.casts: dict = {}
        self.sizes = {'bytes_per_token': self.cache.bytes_per_token, 'cache_bytes': self.cache.nbytes}
        if how == 'compiled' or (how == 'captured' and self.token.is_cuda):
            self.cache.length = context - 1
            self.step = FixedStep(model, self.cache, how == 'compiled')

    def run(self) -> None:
        """One step."""
        self.cache.length = self.context - 1
        with keep_casts(self.casts):
            self.step(self.token)

    def run_attention(self) -> None:
        """The attention layers alone, projections included. Never a CUDA graph."""
        self.cache.length = self.context - 1
        x = torch.ones(self.token.size(0), 1, self.model.config.n_embd, device=self.token.device)
        with keep_casts(self.casts):
            for block in self.model.transformer.h:
                block.attn(x, cache=self.cache)


class HuggingFaceDecoding:
    """The same steps of transformers' GPT-2 with its DynamicCache, which grows by the token and is cut back."""

    def __init__(self, model: Any, batch_size: int, context: int, dtype: str):
        """model: a GPT2LMHeadModel. dtype: of the cache."""
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache()
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.transformer.wte.weight.device)
        config, kind = model.config, machine.DTYPES[dtype]
        filled = (batch_size, config.n_head, context - 1, config.n_embd // config.n_head)
        for layer in range(config.n_layer):
            keys, values = (torch.zeros(filled, device=self.token.device, dtype=kind) for _ in range(2))
            self.cache.update(keys, values, layer)
        per_token = 2 * config.n_layer * config.n_embd * kind.itemsize
        self.sizes = {'bytes_per_token': per_token, 'cache_bytes': per_token * batch_size * context}

    def run(self) -> None:
        """One step."""
        self.model(self.token, past_key_values=self.cache, use_cache=True)
        self.cache.crop(-1)  # removes one token


# ---- this file as a program ------------------------------------------------------------------------------------------


def training_of(task: dict[str, Any]) -> Training:
    """The Training that a SeparateTraining's task describes."""
    setting = Setting(**task['setting'])
    torch.set_num_threads(task['threads'])
    torch.set_float32_matmul_precision(task['precision'])
    model = GPT(GPTConfig(**task['config']), seed=setting.seed).to(setting.device)
    if task['nanogpt']:
        prompt = torch.arange(min(16, setting.block_size), device=setting.device)[None] % model.config.vocab_size
        return NanoGPTTraining(nanogpt_model(task['nanogpt'], model.eval(), prompt), setting)
    if setting.device == 'cpu' and task['leave_out'] != 'memory':
        machine.keep_freed_memory()
    return Training(model, setting, task['leave_out'])


def main(argument: str) -> None:
    """Answer the questions on stdin until it is closed. argument: the task as JSON."""

    def answer(value):
        print(json.dumps(value), file=stdout, flush=True)

    stdout, sys.stdout = sys.stdout, open(os.devnull, 'w')  # what nanoGPT prints is no answer
    sys.excepthook = report_user_errors
    try:
        training = training_of(json.loads(argument))
    except UserError as error:
        answer(str(error))
        return
    for line in sys.stdin:
        result = getattr(training, line.strip())()
        timing.synchronize(training.setting.device)
        answer(result)


if __name__ == '__main__':
    main(sys.argv[1])
