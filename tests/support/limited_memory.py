"""
A GPU with little memory, pretended: imported before a script runs.

MHA's caches of more than 16 tokens in all, and training steps of more than 3 sequences, end in CUDA's error.
"""

import torch

from core.speed.rivals import Training
from model import GPT

make_cache, batch = GPT.init_cache, Training.batch


def init_cache(model, batch_size=1, max_tokens=None, *arguments, **keys):
    cache = make_cache(model, batch_size, max_tokens, *arguments, **keys)
    if max_tokens * batch_size > 16 and cache.bytes_per_token >= 256:
        raise torch.OutOfMemoryError('CUDA out of memory')
    return cache


def limited_batch(training):
    if training.setting.batch_size > 3:
        raise torch.OutOfMemoryError('CUDA out of memory')
    return batch(training)


GPT.init_cache, Training.batch = init_cache, limited_batch
