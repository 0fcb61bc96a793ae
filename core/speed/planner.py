"""
What a model needs before it exists: parameters, FLOPs, memory of training and of decoding, and the speed a GPU allows.

Notable features:
- counted with the models' own code on tensors without data, so that a change of a model changes its counts
- models of one and two layers are counted, and the other layers are like the second: any size takes a second or two
- formulas only for what no code of ours says: the roofline, and how batches fill a GPU

Bytes are those of one GPU. Sources: Williams et al. 2009, "Roofline" (doi 10.1145/1498765.1498785); Pope et al. 2022,
arXiv:2211.05102 (what bounds decoding); Rajbhandari et al. 2019, arXiv:1910.02054 (the states of training).
"""

import contextlib
import functools
import logging
import weakref
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from core.cli import machine
from core.convert.gpt2 import GPT2_SIZES
from core.runs.models import label_of
from core.speed import gpus
from ops.decoding import draw
from ops.kernels import EagerAttention, LinearCrossEntropy, linear_cross_entropy

GPT2 = dict(vocab_size=50257, block_size=1024, bias=True)
# {name: keys of sizing.py}
SHAPES = {name: sizes | GPT2 for name, sizes in GPT2_SIZES.items()} | {
    # Llama 2's (arXiv:2307.09288) with this project's MLP: 6.6 billion parameters
    '7b': dict(n_layer=32, n_head=32, n_embd=4096, vocab_size=32000, block_size=4096, pos='rope'),
    # arXiv:2412.19437, section 4.2, whose cache it has: 576 numbers per token and layer. Published are 128 heads of 128
    # dimensions (64 more for the position) and experts; here heads divide n_embd, and the MLP is dense.
    'deepseek-v3': dict(n_layer=61, n_head=56, n_embd=7168, vocab_size=129280, block_size=4096, pos='rope',
                        n_latents='512', n_latent_q=1536, n_rope=64, latent_norm=True),
}  # fmt: skip
PARTS = {'wte': 'embedding and head', 'wpe': 'positions', 'attn': 'attention', 'mlp': 'MLP', 'ln_': 'norms'}
# What a token takes doesn't depend on the length where attention keeps no patterns, as on a GPU. So many sequences that
# what grows with them outweighs the rest.
LENGTH, FEW, MANY = 256, 256, 512
OPTIMIZERS = {'adamw': (8, 8), 'muon': (4, 8)}  # bytes per parameter: of the blocks' matrices, and of all others


# ---- counting --------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that still exist: `now`, and their `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, made)
        return made

    def add(self, tensor):
        """Count a tensor's memory until it is freed, once for all tensors that share it."""
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.subtract, storage.nbytes())

    def subtract(self, nbytes):
        """A tensor's memory was freed."""
        self.now -= nbytes


@contextlib.contextmanager
def loss_in_pieces(rows):
    """Within this context the loss takes `rows` rows at a time; by itself it would take the CPU's number."""
    own = LinearCrossEntropy.ROWS
    LinearCrossEntropy.ROWS = own | {'cpu': rows}
    try:
        yield
    finally:
        LinearCrossEntropy.ROWS = own


@contextlib.contextmanager
def fused_attention():
    """Within this context attention keeps no patterns, as on a GPU; on a CPU it would for short sequences."""
    own, EagerAttention.HEAD_SIZES = EagerAttention.HEAD_SIZES, 0
    try:
        yield
    finally:
        EagerAttention.HEAD_SIZES = own


@contextlib.contextmanager
def default_dtype(dtype):
    """Within this context new tensors are of a torch.dtype."""
    own = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(own)


def low_precision(dtype):
    """The autocast of training in `dtype`; tensors without data are the CPU's."""
    return machine.autocast('cpu', dtype)


@fused_attention()
def block_bytes(model_class, config, sequences, dtype):
    """
    Memory of a training step of `sequences` x LENGTH tokens, above weights and gradients, as {stretch: bytes}.

    forward, backward: the most at any moment in the blocks; kept: what the loss finds, autocast's copies of the weights
    included. The logits are left out: see `loss_bytes`.
    """
    found = {}
    with FakeTensorMode(), LiveBytes() as live, loss_in_pieces(sequences * LENGTH), low_precision(dtype):
        model = model_class(config).train()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)  # from the micro-batch before
        idx = torch.zeros(sequences, LENGTH, dtype=torch.int64)
        start = live.peak = live.now

        def at_loss(*_):
            found.update(forward=live.peak - start, kept=live.now - start)

        model.transformer.ln_f.register_forward_hook(at_loss)
        loss = model(idx, idx, logits=False)[1]
        live.peak = live.now
    with live:
        loss.backward()
    found['backward'] = live.peak - start
    return found


def loss_bytes(n_embd, vocab_size, rows, dtype, tokens):
    """Memory of the loss of a number of tokens, `rows` at a time, above its input's: bytes."""
    with FakeTensorMode(), LiveBytes() as live, loss_in_pieces(rows), low_precision(dtype):
        x = torch.zeros(tokens, n_embd, requires_grad=True)
        weight = torch.zeros(vocab_size, n_embd, requires_grad=True)
        targets = torch.zeros(tokens, dtype=torch.int64)
        start = live.peak = live.now
        linear_cross_entropy(x, weight, targets)
    return live.peak - start


def decoding_bytes(model_class, config, sequences, dtype):
    """Memory of decoding one token of each sequence, above weights and cache; drawing it counts: bytes."""
    with FakeTensorMode(), LiveBytes() as live, torch.no_grad(), default_dtype(machine.DTYPES[dtype]):
        model = model_class(config).eval()
        cache = model.init_cache(sequences, LENGTH)
        token = torch.zeros(sequences, 1, dtype=torch.int64)
        start = live.peak = live.now
        draw(model(token, cache=cache)[0][:, -1])
    return live.peak - start


def facts(model_class, config):
    """Numbers of a model: parameters of each part, FLOPs per token of training, cached numbers per token."""
    with torch.device('meta'):
        model = model_class(config).eval()
    found = Counter({'training': model.flops_per_token()})
    for name, parameter in model.named_parameters():
        part = next(part for key, part in PARTS.items() if f'.{key}' in name)
        found[part] += parameter.numel()
    with torch.device('meta'):
        found['cached'] = model.init_cache(1, 1, torch.int8).bytes_per_token
    return found


def flop_counter():
    """PyTorch's counter of FLOPs, silent. Its import warns in torch 2.11 where Triton is missing, which is no news."""
    logging.getLogger('torch.utils.flop_counter').setLevel(logging.ERROR)
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def decoding_flops(model_class, config, context):
    """FLOPs of decoding the `context`-th token of a sequence, those of matrix multiplications: {'step': number}."""
    with torch.device('meta'), torch.no_grad(), flop_counter() as counter:
        model = model_class(config).eval()
        cache = model.init_cache(1, context, torch.float32)
        cache.length = context - 1
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    return {'step': counter.get_total_flops()}


def over_layers(count, config):
    """The dict count(config), from models of one and two layers: each further layer adds what the second did."""
    one = count(replace(config, n_layer=1))
    if config.n_layer == 1:
        return one
    two = count(replace(config, n_layer=2))
    return {name: one[name] + (config.n_layer - 1) * (two[name] - one[name]) for name in one}


@dataclass(frozen=True)
class Line:
    """A quantity that grows evenly with a number: fixed + each * number."""

    fixed: float
    each: float

    @classmethod
    def through(cls, x1, y1, x2, y2):
        """The line through two points."""
        each = (y2 - y1) / (x2 - x1)
        return cls(y1 - each * x1, each)

    def __add__(self, other):
        return Line(self.fixed + other.fixed, self.each + other.each)

    def at(self, number):
        """The quantity."""
        return self.fixed + self.each * number

    def most(self, quantity):
        """The largest number at which this is at most `quantity`; below 0 where there is none."""
        return (quantity - self.fixed) / self.each


@functools.cache
def loss_line(n_embd, vocab_size, rows, dtype):
    """`loss_bytes` over the number of tokens, where they are several pieces: a Line."""
    piece = LinearCrossEntropy.piece(rows, vocab_size)
    points = [(n, loss_bytes(n_embd, vocab_size, rows, dtype, n)) for n in (2 * piece, 4 * piece)]
    return Line.through(*points[0], *points[1])


# ---- one model -------------------------------------------------------------------------------------------------------


class Arm:
    """A model that is only planned: its class and config, and the dtype of its products."""

    def __init__(self, model_class, config, dtype='bfloat16'):
        self.model_class, self.config, self.dtype = model_class, config, dtype
        self.bytes_each = machine.DTYPES[dtype].itemsize  # of a weight while decoding, and of a cached number

    def over_layers(self, count, *arguments, **changes):
        """`over_layers` of count(model_class, config, *arguments), with some of the config's keys changed."""
        return over_layers(lambda config: count(self.model_class, config, *arguments), replace(self.config, **changes))

    @property
    def name(self):
        """'MHA', 'GQA-4', 'MQA' or 'MLA, r=64'."""
        return label_of(self.config)

    @functools.cached_property
    def facts(self):
        """See the function `facts`."""
        return self.over_layers(facts)

    @property
    def parameters(self):
        """{part: number of parameters}."""
        return {part: self.facts[part] for part in PARTS.values() if self.facts.get(part)}

    # training

    def state_bytes(self, optimizer, share=1):
        """
        Memory of float32 weights and gradients and of the optimizer's states: {what: bytes}.

        share: of how many GPUs each holds a part of these (FSDP). Muon keeps one number per parameter of the blocks'
        matrices; all else is AdamW's, which keeps two.
        """
        total = sum(self.parameters.values())
        matrices = self.facts['attention'] + self.facts['MLP']
        in_blocks, others = OPTIMIZERS[optimizer]
        states = in_blocks * matrices + others * (total - matrices)
        return {'weights': 4 * total / share, 'gradients': 4 * total / share, 'optimizer': states / share}

    @property
    def gathered_bytes(self):
        """Memory of two blocks' float32 parameters: FSDP gathers the next block while one computes."""
        return 8 * (self.facts['attention'] + self.facts['MLP']) / self.config.n_layer

    @functools.cache  # noqa: B019 (arms are few and live as long as the script)
    def step_lines(self, recompute, device='cuda'):
        """Memory of a training step above the states, over the tokens of a batch, as {stretch: Line of bytes}."""
        changes = dict(recompute=recompute, block_size=LENGTH)
        few, many = (self.over_layers(block_bytes, n, self.dtype, **changes) for n in (FEW, MANY))
        lines = {name: Line.through(FEW * LENGTH, few[name], MANY * LENGTH, many[name]) for name in few}
        sizes = (self.config.n_embd, self.config.vocab_size)
        return lines | {'loss': lines['kept'] + loss_line(*sizes, LinearCrossEntropy.ROWS[device], self.dtype)}

    def step_bytes(self, tokens, recompute, device='cuda'):
        """Memory of a training step of a number of tokens above the states, as {stretch: bytes}; `peak` is the most."""
        found = {name: line.at(tokens) for name, line in self.step_lines(recompute, device).items()}
        rows, V = LinearCrossEntropy.ROWS[device], self.config.vocab_size
        if tokens < 2 * LinearCrossEntropy.piece(rows, V):  # fewer pieces than the line presupposes
            found['loss'] = found['kept'] + loss_bytes(self.config.n_embd, V, rows, self.dtype, tokens)
        return found | {'peak': max(found.values())}

    def largest_training_batch(self, room, block_size, recompute=False):
        """How many sequences of block_size tokens a step can have whose memory is `room` bytes; 0: none fits."""
        lines, V = self.step_lines(recompute).values(), self.config.vocab_size
        found = max(0, int(min(line.most(room) for line in lines) // block_size))
        if found * block_size >= (few := 2 * LinearCrossEntropy.piece(LinearCrossEntropy.ROWS['cuda'], V)):
            return found
        sizes = range(few // block_size, 0, -1)  # for which the loss's line doesn't hold
        fits = (n for n in sizes if self.step_bytes(n * block_size, recompute)['peak'] <= room)
        return next(fits, 0)

    # decoding

    @property
    def weight_bytes(self):
        """Memory of the weights while decoding."""
        return self.bytes_each * sum(self.parameters.values())

    @property
    def cache_bytes(self):
        """Memory that one token of one sequence takes in the cache."""
        return self.bytes_each * self.facts['cached']

    @functools.cached_property
    def decoding_line(self):
        """Memory of a decode step above weights and cache over the number of sequences: a Line of bytes."""
        config = replace(self.config, block_size=LENGTH, n_layer=1)  # one layer's memory serves the next
        points = [(n, decoding_bytes(self.model_class, config, n, self.dtype)) for n in (FEW, MANY)]
        return Line.through(*points[0], *points[1])

    @functools.cached_property
    def flops_line(self):
        """FLOPs of decoding one token over its position in the sequence: a Line."""
        points = [(n, self.over_layers(decoding_flops, n, block_size=16)['step']) for n in (8, 16)]
        return Line.through(*points[0], *points[1])

    def largest_decoding_batch(self, room, context):
        """How many sequences of `context` tokens can be decoded in `room` bytes, weights included; 0: none fits."""
        step = self.decoding_line + Line(self.weight_bytes, self.cache_bytes * context)
        return max(0, int(step.most(room)))

    def decoding_seconds(self, sequences, context, peak, bandwidth):
        """
        The least time of a decode step by the roofline, in seconds, as {what bounds it: its part}.

        peak: FLOP/s; bandwidth: bytes/s. The weights are read once for all sequences, and each sequence's cache once;
        neither part is faster than memory or arithmetic allows, and they follow each other. Rows of the embedding,
        activations and the time between kernels are left out.
        """
        read = self.bytes_each * (sum(self.parameters.values()) - self.facts.get('positions', 0))
        parts = ((read, sequences * self.flops_line.fixed),
                 (sequences * context * self.cache_bytes, sequences * context * self.flops_line.each))  # fmt: skip
        found = Counter(memory=0.0, arithmetic=0.0)
        for nbytes, flops in parts:
            reading, computing = nbytes / bandwidth, flops / peak
            found['memory' if reading >= computing else 'arithmetic'] += max(reading, computing)
        return dict(found)


def gpu_called(name):
    """The GPU of core/cli/machine.py's table with this name, in any case and with - or _ for blanks, or None."""
    wanted = name.lower().replace('-', ' ').replace('_', ' ').split()
    return next((gpu for gpu in gpus.GPUS if gpu.name.lower().split() == wanted), None)
