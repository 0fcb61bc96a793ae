"""
Drawing the next token, and a decode step with fixed shapes that a GPU can replay as a CUDA graph.

Nothing here knows which attention a model has: a model is called as `model(token, cache=cache) -> (logits, None)`.
"""

import torch


def draw(logits, temperature=1.0, top_k=None, top_p=None, valid_ids=None, generator=None):
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
    logits, ids = logits.float() / temperature, None
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


class FixedCache:
    """
    A view of a Cache for steps of fixed shape: the next position is a tensor (1,), and attention sees the whole buffer.

    It has the methods of Cache that a model calls. The tensors are the cache's own.
    """

    def __init__(self, cache):
        self.layers, self.max_tokens, self.copies = cache.layers, cache.max_tokens, cache.copies
        self.position = torch.full((1,), cache.length, device=cache.layers[0][0].device)

    def positions(self, T):
        """Where the next token stands. T is 1."""
        return self.position

    def append(self, layer, *new):
        """Write `new` (each (B, ..., 1, size)) at the position; returns the whole buffers."""
        buffers = self.layers[layer]
        return [t.index_copy_(-2, self.position, part.to(t.dtype)) for t, part in zip(buffers, new, strict=True)]

    def visible(self):
        """Bool (1, max_tokens): which keys the one query may see."""
        return torch.arange(self.max_tokens, device=self.position.device)[None] <= self.position

    def advance(self, T):
        """Nothing: FixedStep sets the position before each step."""


class FixedStep:
    """
    A decode step whose shapes never change.

    On a GPU it is captured as a CUDA graph and replayed: one kernel launch instead of hundreds. Elsewhere it runs
    eagerly, which is slower than an ordinary step, because attention reads all `max_tokens`; the logits are the same.
    """

    def __init__(self, model, cache):
        """cache: a Cache with room for at least one token. Under autocast, call the step in the same context."""
        self.model, self.cache, self.fixed, self.graph = model, cache, FixedCache(cache), None
        self.device = self.fixed.position.device
        self.token = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=self.device)
        if self.device.type == 'cuda':
            self.capture()

    def capture(self):
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

    def replay(self):
        """Launch the captured step on its GPU's current stream."""
        with torch.cuda.device(self.device):
            self.graph.replay()

    def run(self):
        """The logits (B, 1, V) for `token` at the current position."""
        return self.model(self.token, cache=self.fixed)[0]

    def __call__(self, token):
        """The logits (B, 1, V) that `model(token, cache=cache)` gives for token (B, 1); valid until the next call."""
        self.token.copy_(token)
        self.fixed.position.fill_(self.cache.length)
        if self.graph is None:
            self.logits = self.run()
        else:
            self.replay()
        self.cache.advance(1)
        return self.logits
