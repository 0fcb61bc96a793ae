"""
What a model needs before it exists: parameters, FLOPs, memory of training and of decoding, and the speed a GPU allows.

Notable features:
- memory between the layers is counted with the models' own code on tensors without data: it follows their changes
- models of one and two layers are counted, and the other layers are like the second: any size takes a second or two
- formulas for what is plainer so, each compared with the real thing in tests/scripts/test_sizing.py

Bytes are those of one GPU. Sources: Williams et al. 2009, "Roofline" (doi 10.1145/1498765.1498785); Pope et al. 2022,
arXiv:2211.05102 (what bounds decoding); Rajbhandari et al. 2019, arXiv:1910.02054 (the states of training).
"""

import functools
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from core.cli import machine
from core.cli.errors import UserError
from core.convert.gpt2 import GPT2_SIZES
from core.runs.models import label_of
from core.speed import timing
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.kernels import EAGER_HEAD_SIZES, loss_rows

GPT2 = dict(vocab_size=50257, block_size=1024, bias=True)
# {name: keys of sizing.py}
SHAPES: dict[str, dict[str, Any]] = {
    **{name: sizes | GPT2 for name, sizes in GPT2_SIZES.items()},
    # Llama 2's (arXiv:2307.09288) with this project's MLP: 6.6 billion parameters
    '7b': dict(n_layer=32, n_head=32, n_embd=4096, vocab_size=32000, block_size=4096, pos='rope'),
}
# arXiv:2412.19437, section 4.2, whose cache it has: 576 numbers per token and layer. Published are 128 heads of 128
# dimensions (64 more for the position) and experts; here heads divide n_embd, and the MLP is dense.
SHAPES['deepseek-v3'] = dict(n_layer=61, n_head=56, n_embd=7168, vocab_size=129280, block_size=4096, pos='rope')
SHAPES['deepseek-v3'] |= dict(n_latents='512', n_latent_q=1536, n_rope=64, latent_norm=True)
PARTS = {'wte': 'embedding and head', 'wpe': 'positions', 'attn': 'attention', 'mlp': 'MLP', 'ln_': 'norms'}
FEW, MANY = 256, 512  # sequences, so many that what grows with them outweighs the rest
Variant = tuple[type[GPT], GPTConfig]
# bytes per parameter: of the blocks' matrices, of which Muon keeps one number where AdamW keeps two, and of all others
OPTIMIZERS = {'adamw': (8, 8), 'muon': (4, 8)}


def variants(keys: dict[str, Any], kv_heads: Iterable[int], latents: Iterable[int]) -> list[Variant]:
    """
    (class, config) of MHA or GQA with each number of key/value heads, and of MLA with each size of the latent.

    keys: a script's, of which the models take theirs. UserError where the sizes don't fit together.
    """
    kinds: list[tuple] = [(GPT, GPTConfig, {'n_kv_head': number}) for number in kv_heads]
    kinds += [(MLAGPT, MLAConfig, {'n_latent': size}) for size in latents]
    found = []
    for model_class, config_class, own in kinds:
        names = {field.name for field in fields(config_class)} & keys.keys()
        if config_class is GPTConfig:
            names.discard('n_rope')  # MHA's heads are rotated whole; the key is about MLA's shared part
        try:
            found.append((model_class, config_class(**{name: keys[name] for name in names} | own)))
        except ValueError as error:
            raise UserError(str(error)) from error
    return found


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that still exist: `now`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, made)
        return made

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's memory until it is freed, once for all tensors that share it."""
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.subtract, storage.nbytes())

    def subtract(self, nbytes: int) -> None:
        """A tensor's memory was freed."""
        self.now -= nbytes


class Plan:
    """A model that is only planned: its class and config, the dtype of its products, and the kind of its cache."""

    def __init__(self, model_class: type[GPT], config: GPTConfig, dtype: str = 'bfloat16', cache: str = 'float'):
        self.model_class, self.config, self.dtype = model_class, config, dtype
        self.name = label_of(config)  # 'MHA', 'GQA-4', 'MQA' or 'MLA, r=64'
        self.bytes_each = machine.DTYPES[dtype].itemsize  # of a weight while decoding
        with torch.device('meta'):
            model = model_class(config)
            self.cache_bytes = model.init_cache(1, 1, machine.DTYPES[dtype], cache).bytes_per_token  # of one sequence
        self.training_flops = model.flops_per_token()
        counts: Counter[str] = Counter()
        for name, parameter in model.named_parameters():
            counts[next(part for key, part in PARTS.items() if f'.{key}' in name)] += parameter.numel()
        self.parameters = {part: counts[part] for part in PARTS.values() if counts[part]}
        self.total = counts.total()
        self.matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - counts['positions']

    # ---- training ----------------------------------------------------------------------------------------------------

    def state_bytes(self, optimizer: str, share: int = 1) -> dict[str, float]:
        """Bytes of float32 weights, gradients, optimizer states; share: of how many GPUs each holds a part (FSDP)."""
        in_blocks = self.parameters['attention'] + self.parameters['MLP']
        of_blocks, of_others = OPTIMIZERS[optimizer]
        states = of_blocks * in_blocks + of_others * (self.total - in_blocks)
        return {'weights': 4 * self.total / share, 'gradients': 4 * self.total / share, 'optimizer': states / share}

    @property
    def gathered_bytes(self) -> float:
        """Memory of two blocks' float32 parameters: FSDP gathers the next block while one computes."""
        return 8 * (self.parameters['attention'] + self.parameters['MLP']) / self.config.n_layer

    @property
    def counted_length(self) -> int:
        """Tokens of a sequence that is long enough for attention on a CPU to keep no patterns, as on a GPU."""
        return EAGER_HEAD_SIZES * max(16, self.config.widths[0]) + 1

    def counted_bytes(self, n_layer: int, sequences: int, recompute: bool) -> dict[str, float]:
        """
        Memory of a training step of some layers, above weights and gradients, as {stretch: bytes}.

        sequences: of `counted_length` tokens. forward, backward: the most at any moment in the blocks; kept: what the
        loss finds, autocast's copies of the weights included. The loss has a vocabulary of 1: see `loss_bytes`.
        """
        sizes: dict[str, Any] = dict(n_layer=n_layer, block_size=self.counted_length, vocab_size=1, recompute=recompute)
        found: dict[str, float] = {}
        with FakeTensorMode(), LiveBytes() as live, machine.autocast('cpu', self.dtype):
            model = self.model_class(replace(self.config, **sizes)).train()
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)  # from the micro-batch before
            idx = torch.zeros(sequences, self.counted_length, dtype=torch.int64)
            start = live.peak = live.now

            def at_loss(*_):
                found.update(forward=live.peak - start, kept=live.now - start)

            model.transformer.ln_f.register_forward_hook(at_loss)
            loss = model(idx, idx, logits=False)[1]
            live.peak = live.now
        with live:
            loss.backward()
        return found | {'backward': live.peak - start}

    @functools.cache  # noqa: B019 (plans are few and live as long as the script)
    def step_lines(self, recompute: bool) -> dict[str, tuple[float, float]]:
        """Memory of a training step above the states: {stretch: (bytes, and bytes for each token of a batch)}."""

        def count(sequences):
            one, two = (self.counted_bytes(n, sequences, recompute) for n in (1, 2))
            return {name: one[name] + (self.config.n_layer - 1) * (two[name] - one[name]) for name in one}

        few, many = count(FEW), count(MANY)
        each = {name: (many[name] - few[name]) / ((MANY - FEW) * self.counted_length) for name in few}
        lines = {name: (few[name] - each[name] * FEW * self.counted_length, each[name]) for name in few}
        of_head = 4 * self.config.n_embd * self.config.vocab_size  # its gradient, which the loss has computed
        return lines | {'backward': (lines['backward'][0] + of_head, each['backward'])}

    def loss_bytes(self, tokens: int, device: str = 'cuda') -> int:
        """Memory that ops/kernels.py's LinearCrossEntropy takes above its input's, at the most."""
        C, V, each = self.config.n_embd, self.config.vocab_size, self.bytes_each
        rows = min(tokens, loss_rows(device, V))
        whole = 4 * C * V + each * C * tokens  # gradients of weight and input
        if each == 4:
            return whole + rows * max(8 * V, 4 * V + 8 * C)
        # 16-bit copies, then float32 log-probabilities: a CPU makes them of float32 logits; then the gradient of the
        # logits beside them, with rows of the input's gradient or with the product that is added to the weight's
        softmax = (10 if device == 'cpu' else 6) * rows * V
        return whole + 2 * C * (tokens + V) + max(softmax, 6 * rows * V + 2 * max(2 * rows * C, rows * C + C * V))

    def step_bytes(self, tokens: int, recompute: bool, device: str = 'cuda') -> dict[str, float]:
        """Memory of a training step of a number of tokens above the states, as {stretch: bytes}; `peak` is the most."""
        found = {name: fixed + each * tokens for name, (fixed, each) in self.step_lines(recompute).items()}
        found['loss'] = found['kept'] + self.loss_bytes(tokens, device)
        return found | {'peak': max(found.values())}

    def largest_training_batch(self, room: float, block_size: int, recompute: bool = False) -> int:
        """How many sequences of block_size tokens a step can have whose memory is `room` bytes; 0: none fits."""

        def fits(sequences):
            return self.step_bytes(sequences * block_size, recompute)['peak'] <= room or None

        return timing.largest(fits, 2**62 // block_size)[0]

    # ---- decoding ----------------------------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights while decoding."""
        return self.bytes_each * self.total

    @property
    def drawing_bytes(self) -> int:
        """
        Memory that a decode step takes for each sequence besides its cache.

        It is most in ops/decoding.py's `draw`, which has the logits and four float32 numbers for each of them, or for a
        small vocabulary in the MLP: the residual stream before and after attention, its norm, and the hidden layer
        before and after GELU.
        """
        return max((16 + self.bytes_each) * self.config.vocab_size, 11 * self.bytes_each * self.config.n_embd)

    def decoding_flops(self, context: int) -> int:
        """
        FLOPs of decoding the token at position `context` of a sequence.

        Two per parameter of a matrix, MLA's up-projection being absorbed, and per head, layer and position two for each
        number of a key and of a value; those of MLA are the cached ones.
        """
        config = self.config
        size = config.n_latent + config.n_rope if isinstance(config, MLAConfig) else config.head_size
        return 2 * self.matrices + 4 * config.n_layer * config.n_head * size * context

    def largest_decoding_batch(self, room: float, context: int) -> int:
        """How many sequences of `context` tokens can be decoded in `room` bytes, weights included; 0: none fits."""
        return max(0, int((room - self.weight_bytes) / (self.drawing_bytes + self.cache_bytes * context)))

    def decoding_seconds(self, sequences: int, context: int, peak: float, bandwidth: float) -> dict[str, float]:
        """
        The least time of a decode step by the roofline, in seconds, as {what bounds it: its part}.

        peak: FLOP/s; bandwidth: bytes/s. The weights are read once for all sequences, and each sequence's cache once;
        neither part is faster than memory or arithmetic allows, and they follow each other. Rows of the embedding,
        activations and the time between kernels are left out.
        """
        tokens = sequences * context
        weights = self.bytes_each * (self.total - self.parameters.get('positions', 0))
        found = {'memory': 0.0, 'arithmetic': 0.0}
        fixed = self.decoding_flops(0)
        of_weights = weights, sequences * fixed
        of_caches = tokens * self.cache_bytes, sequences * (self.decoding_flops(context) - fixed)
        for nbytes, flops in (of_weights, of_caches):
            reading, computing = nbytes / bandwidth, flops / peak
            found['memory' if reading >= computing else 'arithmetic'] += max(reading, computing)
        return found
