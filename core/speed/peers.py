"""
Other programs to compare with: nanoGPT's model and Hugging Face's GPT-2, with the weights of one of our models.

Each is checked to give our logits: times of two models that compute different things can't be compared.
"""

import contextlib
import importlib.util
import io
import os
import sys

import numpy as np
import torch

from core.cli.errors import UserError
from core.convert.gpt2 import hf_settings, to_gpt2
from core.runs.models import NANOGPT_ARGS


def nanogpt_model(folder, ours, prompt):
    """
    nanoGPT's GPT with the weights of `ours`, in eval mode and on its device, from the model.py in `folder`.

    ours: a GPT in eval mode; prompt: token ids (B, T) for the comparison of logits. UserError where `folder` has no
    model.py, and where the logits differ.
    """
    module = nanogpt_module(folder)
    settings = {name: getattr(ours.config, name) for name in NANOGPT_ARGS}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        theirs = module.GPT(module.GPTConfig(**settings))
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.eval().to(prompt.device)
    check_logits(theirs, ours, prompt, 'nanoGPT')
    return theirs


def nanogpt_module(folder):
    """The model.py in the folder of a nanoGPT checkout, imported as `nanogpt_model`. UserError if it is missing."""
    file = os.path.join(folder, 'model.py')
    if not os.path.isfile(file):
        raise UserError(f'{file} is missing; --nanogpt must be the folder of a nanoGPT checkout')
    spec = importlib.util.spec_from_file_location('nanogpt_model', file)
    module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt_batch(tokens, batch_size, block_size):
    """A random batch (x, y), each int64 (batch_size, block_size), gathered row by row as in nanoGPT's get_batch."""
    starts = torch.randint(len(tokens) - block_size, (batch_size,)).tolist()
    rows = [tokens[i : i + block_size + 1].astype(np.int64) for i in starts]
    x, y = (torch.stack([torch.from_numpy(row[part]) for row in rows]) for part in (slice(-1), slice(1, None)))
    return x, y


def huggingface_model(ours, prompt):
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
def check_logits(theirs, ours, prompt, name):
    """UserError unless both models, called with prompt (B, T), return equal logits (B, 1, V) of the last position."""
    logits, expected = theirs(prompt)[0], ours(prompt)[0]
    # the tolerance leaves room for bfloat16's rounding; NaN fails
    if not (logits - expected).abs().max() <= 1e-2 * expected.abs().max():
        raise UserError(f"{name}'s logits differ from ours for the same weights; compare with an unmodified version")
