"""
Decoding: drawing the next token, keeping the sequences so far, and a step of fixed shape for CUDA graphs and compilers.

Nothing here knows which attention a model has: a model is called as `model(token, cache=cache) -> (logits, None)`.
"""

from collections.abc import Callable
from typing import Any

import torch

from ops.cache import Cache, FixedCache
from ops.kernels import keep_casts

SIZES = 128  # a compiled step serves one size of the cache: a multiple of so many tokens


def draw(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    valid_ids: int | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Draw one token id per row of logits (B, V) -> (B,) int64, without waiting for the device.

    temperature: 0 takes the most likely id. top_k: keep the k most likely ids. top_p: keep the smallest set of ids
    whose probability reaches p (nucleus sampling, arXiv:1904.09751). valid_ids: ids at or above are never drawn.
    generator: a torch.Generator on the logits' device.
    """
    if valid_ids is not None:
        logits = logits[:, :valid_ids]
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / max(temperature, 1e-30), None  # float32's quotients stay finite
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # the more likely ids alone already reach p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float('-inf'))
    # exponential race: argmax of p_i / e_i draws i with probability p_i, and unlike torch.multinomial never syncs
    # shape alone decides the noise, whatever the strides of the logits: the same seed gives the same text
    noise = torch.empty(logits.shape, device=logits.device).exponential_(generator=generator)
    winner = (logits.softmax(dim=-1) / noise).argmax(dim=-1, keepdim=True)
    return (winner if ids is None else ids.gather(-1, winner)).squeeze(-1)


class Decoder:
    """
    Sequences that grow token by token, and the model's logits for the next one: a loop over `draw` and `append`.

    A cache makes a step cheap, and a prompt is read once for all its samples. Learned positions in a cache can't slide:
    when it is full, the most recent half of its tokens is read again. Without a cache every token is computed again, in
    a window that slides over the last block_size tokens.
    """

    def __init__(
        self,
        model: Any,
        idx: torch.Tensor,
        max_new_tokens: int,
        use_cache: bool = True,
        cache: str = 'float',
        num_samples: int = 1,
        top_p: float | None = None,
        valid_ids: int | None = None,
        generator: torch.Generator | None = None,
        stop_token: int | None = None,
        on_token: Callable[[torch.Tensor], None] | None = None,
        fixed: bool | None = None,
        compiled: bool = False,
    ):
        """
        model: a GPT; idx (B, t): the prompts. cache: its kind, of cache.KINDS. num_samples: sequences per prompt.
        top_p, valid_ids, generator: as for `draw`. stop_token: a sequence that has it is filled up with it. on_token:
        called with each new column (B * num_samples,). fixed: decode by a FixedStep (None: on CUDA only). compiled: by
        one that torch.compile has compiled.
        """
        self.model, self.window = model, model.config.block_size
        self.rules: dict[str, Any] = dict(top_p=top_p, valid_ids=valid_ids, generator=generator)
        self.stop_token, self.on_token = stop_token, on_token
        self.fixed, self.compiled = compiled or (idx.is_cuda if fixed is None else fixed), compiled
        self.cache: Any = None
        self.step: FixedStep | None = None
        self.casts: dict = {}
        prompt = idx[:, -self.window :]
        if compiled and not use_cache:
            raise ValueError('compiled steps have a cache; leave out compiled or use_cache=False')
        if use_cache:
            tokens, unit = prompt.size(1) + max_new_tokens, SIZES if compiled else 1
            self.cache = model.init_cache(idx.size(0), -(-tokens // unit) * unit, kind=cache)
        self.logits = self.run(prompt)
        if num_samples > 1:
            idx, self.logits = (t.repeat_interleave(num_samples, dim=0) for t in (idx, self.logits))
            self.cache = self.cache.repeat(num_samples) if use_cache else None
        self.tokens = torch.empty(idx.size(0), idx.size(1) + max_new_tokens, dtype=idx.dtype, device=idx.device)
        self.tokens[:, : idx.size(1)] = idx
        self.length = idx.size(1)
        self.stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)

    def run(self, idx: torch.Tensor) -> torch.Tensor:
        """The model's logits (B, 1, V) after idx (B, T), which continues what the cache holds."""
        with keep_casts(self.casts):
            return self.model(idx, cache=self.cache)[0]

    def draw(self, temperature: float = 1.0, top_k: int | None = None) -> torch.Tensor:
        """The next token of each sequence (B,), drawn from `logits`."""
        return draw(self.logits[:, -1], temperature, top_k, **self.rules)

    def append(self, token: torch.Tensor) -> bool:
        """Add a token (B,) to the sequences and compute the logits after it; False if no further one is wanted."""
        if self.stop_token is not None:
            token = torch.where(self.stopped, self.stop_token, token)
            self.stopped |= token == self.stop_token
        self.tokens[:, self.length] = token
        self.length += 1
        if self.on_token is not None:
            self.on_token(token)
        # reading `stopped` waits for the device, so it is read only where there is a stop token
        if self.length == self.tokens.size(1) or (self.stop_token is not None and bool(self.stopped.all())):
            return False
        if self.cache is None:
            self.logits = self.run(self.tokens[:, max(0, self.length - self.window) : self.length])
        elif self.cache.length == self.cache.max_tokens:
            self.cache.length = 0
            self.logits = self.run(self.tokens[:, self.length - max(1, self.cache.max_tokens // 2) : self.length])
        elif self.fixed:
            self.step = self.step or FixedStep(self.model, self.cache, self.compiled)
            self.logits = self.step(token[:, None])
        else:
            self.logits = self.run(token[:, None])
        return True


def logits_of(model: Any, token: torch.Tensor, cache: Any) -> torch.Tensor:
    """A model's logits (B, 1, V) for `token` (B, 1), which continues what the cache holds."""
    return model(token, cache=cache)[0]


class FixedStep:
    """
    A decode step whose shapes never change.

    On a GPU it is captured as a CUDA graph and replayed: one kernel launch instead of hundreds. On a CPU torch.compile
    can do as much: thousands of small operations become some hundred. Run eagerly it is slower than an ordinary step,
    because attention reads all `max_tokens`; the logits are the same.
    """

    def __init__(self, model: Any, cache: Cache, compiled: bool = False):
        """
        cache: a Cache with room for at least one token. Under autocast, call the step in the same context.

        compiled: by torch.compile, which takes a minute in the first step of each model, batch size and max_tokens, and
        needs a C++ compiler on a CPU.
        """
        self.model, self.cache, self.fixed = model, cache, FixedCache(cache)
        self.logits_of = torch.compile(logits_of, dynamic=False, fullgraph=True) if compiled else logits_of
        self.graph: Any = None
        self.casts: dict = {}  # a graph reads these copies of weights as long as it lives
        self.device = self.fixed.position.device
        self.token = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=self.device)
        if self.device.type == 'cuda':
            self.capture()

    def capture(self) -> None:
        """
        Record the step as a CUDA graph. What the warm-up writes to the cache, the first step overwrites.

        A graph holds the kernels of one stream, and a stream belongs to one GPU: both must be those of the cache,
        whichever GPU is current. The kernels of another GPU would run at once and leave the graph empty.
        """
        with torch.cuda.device(self.device):
            stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(2):  # libraries initialize on first use, which can't be captured
                    self.run()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # without a stream PyTorch takes one that it keeps from the first capture, of that capture's GPU
            with torch.cuda.graph(graph, stream=stream):
                self.logits = self.run()
        self.graph = graph

    def run(self) -> torch.Tensor:
        """The logits (B, 1, V) for `token` at the current position."""
        with keep_casts(self.casts):
            return self.logits_of(self.model, self.token, self.fixed)

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """The logits (B, 1, V) that `model(token, cache=cache)` gives for token (B, 1); valid until the next call."""
        self.token.copy_(token)
        self.fixed.position.fill_(self.cache.length)
        if self.graph is None:
            self.logits = self.run()
        else:
            with torch.cuda.device(self.device):  # a graph is launched on the current stream of its GPU
                self.graph.replay()
        self.cache.advance(1)
        return self.logits
