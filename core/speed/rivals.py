"""
Steps to be timed, and the random data that they need. Of training: ours, ours without one optimisation, and nanoGPT's.
Of decoding: ours, and Hugging Face's.

Contenders that change the allocator or a library's state run in a separate process, which is this file as a program:

    python -m core.speed.rivals '{"setting": {...}, ...}'

It reads 'step' or 'peak' per line of stdin and writes one JSON value per line to stdout: a number, or a str that says
what is wrong. SeparateTraining starts it and is the only one that talks to it.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from core.cli import machine
from core.cli.errors import UserError, report_user_errors
from core.speed import timing
from core.speed.peers import nanogpt_batch, nanogpt_model
from core.text.dataset import TokenData
from core.text.tokenizer import GPT2Tokenizer
from model import GPT, GPTConfig
from ops.decoding import FixedStep
from ops.optimizers import adamw, param_groups

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = {
    'memory': 'freed memory returns to the system',
    'fused': 'AdamW loops over tensors',
    'loss': 'all logits are computed at once',
}


def random_data(folder, vocab_size, block_size, seed):
    """Write a data set of random token ids to `folder`, without meta.json: in nanoGPT's format for GPT-2's ids."""
    ids, size = min(vocab_size, GPT2Tokenizer.n_vocab), max(2**20, 2 * block_size)
    tokens = np.random.default_rng(seed).integers(ids, size=size, dtype=np.uint16)
    for split in ('train', 'val'):
        tokens.tofile(os.path.join(folder, f'{split}.bin'))


def random_words(path, size, seed):
    """Write `size` bytes of random words to `path`; their frequencies follow Zipf's law, as those of a language do."""
    rng = np.random.default_rng(seed)
    letters = np.array(list('etaoinshrdlucmfwypvbgkjqxz'))
    words = [''.join(rng.choice(letters, length)) for length in rng.integers(1, 12, size=20000)]
    with open(path, 'w', encoding='utf-8') as file:
        while file.tell() < size:
            line = rng.zipf(1.2, size=200000) % len(words)
            file.write(' '.join(words[i] for i in line) + '\n')


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

    def __init__(self, model, setting, leave_out=''):
        """setting: a Setting. leave_out: a name in WITHOUT."""
        self.model, self.setting, self.iteration = model.train(), setting, 0
        groups = param_groups(model.named_parameters(), 0.1)
        self.optimizer = adamw(groups, 1e-3, (0.9, 0.95), setting.device.split(':')[0])
        if leave_out == 'fused':
            groups = [{k: group[k] for k in ('params', 'weight_decay')} for group in self.optimizer.param_groups]
            self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
        self.call = torch.compile(model) if setting.compile else model
        self.arguments = {'logits': leave_out == 'loss'}
        self.dtype = setting.dtype
        self.data = self.open_data()

    def open_data(self):
        """What `batch` reads from."""
        return TokenData(self.setting.data, self.setting.block_size)

    def batch(self):
        """The next batch (x, y) on the CPU."""
        size = self.setting.batch_size
        return self.data.batch(self.setting.seed, self.iteration, size, slice(0, size))

    def run(self):
        """One step."""
        x, y = machine.to_device(*self.batch(), self.setting.device)
        with machine.autocast(self.setting.device, self.dtype):
            loss = self.call(x, y, **self.arguments)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.iteration += 1

    def peak_bytes(self):
        """Peak memory of one step, in bytes."""
        return timing.peak_bytes(self.run, self.setting.device)


class NanoGPTTraining(Training):
    """Training steps of nanoGPT's model, with its optimizer and its batches, as its train.py takes them."""

    def __init__(self, model, setting):
        super().__init__(model, setting)
        self.arguments = {}
        self.dtype = setting.dtype if setting.device.startswith('cuda') else 'float32'  # it has no autocast on a CPU

    def open_data(self):
        return np.memmap(os.path.join(self.setting.data, 'train.bin'), dtype=np.uint16, mode='r')

    def batch(self):
        return nanogpt_batch(self.data, self.setting.batch_size, self.setting.block_size)


class SeparateTraining:
    """
    Training steps in a separate process: their effect on allocator and libraries doesn't reach the other contenders.

    A context manager: leaving it ends the process. Every method raises UserError where the process fails.
    """

    def __init__(self, name, setting, gpt_args, leave_out='', nanogpt=''):
        """gpt_args: keyword arguments of GPTConfig. nanogpt: the folder of a nanoGPT checkout; '': our model."""
        task = dict(setting=asdict(setting), gpt_args=gpt_args, leave_out=leave_out)
        task['nanogpt'] = nanogpt and os.path.abspath(nanogpt)
        task.update(threads=torch.get_num_threads(), precision=torch.get_float32_matmul_precision())
        command = [sys.executable, '-m', 'core.speed.rivals', json.dumps(task)]
        self.name = name
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        self.run()  # returns when the process is ready
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def ask(self, question):
        """The number that the process answers to 'step' (0, after one step) or 'peak' (bytes)."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(question + '\n')
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else 'its process ended, with the error above'
        if isinstance(answer, str):
            raise UserError(f"{self.name} can't be measured: {answer}")
        return answer

    def run(self):
        """One step."""
        self.ask('step')

    def peak_bytes(self):
        """Peak memory of one step, in bytes."""
        return self.ask('peak')


class Decoding:
    """Decoding steps of a model at a fixed context length: every step writes the same last position of its cache."""

    def __init__(self, model, batch_size, context, captured=True):
        """captured: on a GPU, as a CUDA graph."""
        self.model, self.context = model, context
        self.cache = model.init_cache(batch_size, context)
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.lm_head.weight.device)
        self.step = functools.partial(model, cache=self.cache)
        self.sizes = {'bytes_per_token': self.cache.bytes_per_token, 'cache_bytes': self.cache.nbytes}
        if captured and self.token.is_cuda:
            self.cache.length = context - 1
            self.step = FixedStep(model, self.cache)

    def run(self, times=4):
        """Take `times` steps. Returns `times`."""
        for _ in range(times):
            self.cache.length = self.context - 1
            self.step(self.token)
        return times

    def run_attention(self, times=4):
        """The attention layers alone, `times` times, projections included. Returns `times`. Never a CUDA graph."""
        self.cache.length = self.context - 1
        x = torch.ones(self.token.size(0), 1, self.model.config.n_embd, device=self.token.device)
        for _ in range(times):
            for block in self.model.transformer.h:
                block.attn(x, cache=self.cache)
        return times


class HuggingFaceDecoding:
    """The same steps of transformers' GPT-2 with its DynamicCache, which grows by the token and is cut back."""

    def __init__(self, model, batch_size, context, dtype):
        """model: a GPT2LMHeadModel. dtype: of the cache, a name in runtime.DTYPES."""
        from transformers import DynamicCache

        self.model, self.context, self.cache = model, context, DynamicCache()
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.lm_head.weight.device)
        config, dtype = model.config, machine.DTYPES[dtype]
        filled = (batch_size, config.n_head, context - 1, config.n_embd // config.n_head)
        for layer in range(config.n_layer):
            parts = (torch.zeros(filled, device=self.token.device, dtype=dtype) for _ in range(2))
            self.cache.update(*parts, layer)
        per_token = 2 * config.n_layer * config.n_embd * dtype.itemsize
        self.sizes = {'bytes_per_token': per_token, 'cache_bytes': per_token * batch_size * context}

    def run(self, times=4):
        """Take `times` steps. Returns `times`."""
        for _ in range(times):
            self.model(self.token, past_key_values=self.cache, use_cache=True)
            self.cache.crop(-1)  # removes one token
        return times


def training_of(task):
    """The Training that a SeparateTraining's task, a dict, describes."""
    setting = Setting(**task['setting'])
    torch.set_num_threads(task['threads'])
    torch.set_float32_matmul_precision(task['precision'])
    model = GPT(GPTConfig(**task['gpt_args']), seed=setting.seed).to(setting.device)
    if task['nanogpt']:
        prompt = torch.arange(min(16, setting.block_size), device=setting.device)[None] % model.config.vocab_size
        return NanoGPTTraining(nanogpt_model(task['nanogpt'], model.eval(), prompt), setting)
    if setting.device == 'cpu' and task['leave_out'] != 'memory':
        machine.keep_freed_memory()
    return Training(model, setting, task['leave_out'])


def main(argument):
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
        if line.strip() == 'peak':
            answer(training.peak_bytes())
        else:
            training.run()
            timing.synchronize(training.setting.device)
            answer(0)


if __name__ == '__main__':
    main(sys.argv[1])
