"""
Checkpoints: what one holds, writing one so that a crash leaves no broken file, and reading one, which runs no code.

The keys are nanoGPT's and more, so its sample.py reads our MHA checkpoints, and its checkpoints are read here.
"""

import contextlib
import os
import zipfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from core.cli import files
from core.cli.errors import UserError
from core.text.meta import NUMPY

OTHER_COPY = 'use an older copy, or another checkpoint of the same folder'
# The keys of a checkpoint and their types. All but the first two may be missing or None.
TYPES: dict[str, Any] = {
    **dict.fromkeys(('model', 'model_args', 'optimizer', 'config', 'tokenizer', 'scaler'), dict),
    'learning': dict,  # which rows learn slowly, and whether Muon divides fused matrices: see resume.learning_rules
    **dict.fromkeys(('iter_num', 'tokens'), int),
    **dict.fromkeys(('best_val_loss', 'val_loss'), (int, float, torch.Tensor)),  # nanoGPT's is a tensor
    **dict.fromkeys(('attention', 'corpus', 'wandb_run_id'), str),
}


def save(path: str, checkpoint: dict, others: Iterable[str] = ()) -> None:
    """Write a checkpoint to `path`, whole or not at all: with a UserError the old file stays. others: further names."""
    try:
        with files.replacing(path, 'wb') as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise UserError(f"{path} can't be written: {folder} was moved or removed during the run") from error
        hint = 'free some disk space or choose another --out_dir; the previous checkpoint is as it was'
        raise UserError(f"{path} can't be written ({error}); {hint}") from error
    for other in others:
        link(path, other)


def link(path: str, other: str) -> None:
    """Give the file `path` a second name `other`, replacing that file; a copy where hard links are not supported."""
    beside = f'{other}.writing'
    with contextlib.suppress(OSError):
        os.remove(beside)
    try:
        os.link(path, beside)
    except OSError:
        save(other, torch.load(path, map_location='cpu', weights_only=True))
        return
    os.replace(beside, other)
    files.sync_folder(os.path.dirname(other))


class Writer:
    """
    Saves in a background thread: training waits only for the tensors to be copied, and the next call raises an error.
    writes: False on ranks that only take part in gathering a sharded model's tensors.
    """

    def __init__(self, writes: bool = True):
        self.writes = writes
        self.thread = ThreadPoolExecutor(1)
        self.saving: Future | None = None

    def save(self, path: str, checkpoint: dict, others: Iterable[str] = ()) -> None:
        """Copy `checkpoint` now; write it to `path`, with `others` as further names, while the caller continues."""
        self.wait()
        snapshot = copy_tensors(checkpoint, keep=self.writes)
        if self.writes:
            self.saving = self.thread.submit(save, path, snapshot, others)

    def wait(self) -> None:
        """Return when the last save is on disk; raises its error."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            saving.result()


def copy_tensors(value: Any, copies: dict | None = None, keep: bool = True) -> Any:
    """
    A copy of nested dicts and lists with full CPU copies of their tensors, one of a tensor that occurs twice. Sharded
    ones are gathered, so every process must call this; keep=False discards the result. (Local shards may be empty and
    share an address, so sharded tensors are identified by object.)
    """
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        sharded = hasattr(value, 'full_tensor')
        key = id(value) if sharded or not value.numel() else (value.data_ptr(), value.shape, value.dtype)
        if key not in copies:
            whole = value.detach().full_tensor() if sharded else value.detach()  # type: ignore[attr-defined]
            copies[key] = whole.to('cpu', copy=not sharded) if keep else None
        return copies[key]
    if isinstance(value, dict):
        return {k: copy_tensors(v, copies, keep) for k, v in value.items()}
    if isinstance(value, list):
        return [copy_tensors(v, copies, keep) for v in value]
    return value


def find(path: str) -> str:
    """The checkpoint file that `path` names: itself, or ckpt.pt in a folder. UserError if it doesn't exist."""
    file = os.path.join(path, 'ckpt.pt') if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise UserError(f'there is no checkpoint {file}; train a model first, or name another folder')
    return file


def check_sums(file: str) -> None:
    """UserError where a part of the file differs from its CRC. torch.save writes zip files, torch.load ignores CRCs."""
    if not zipfile.is_zipfile(file):
        return  # PyTorch's format before 1.6 has no checksums; torch.load says what is wrong with other files
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged zip file raises almost anything
        raise UserError(f'{file} is damaged ({error}); {OTHER_COPY}') from error
    if damaged:
        raise UserError(f'{file} is damaged: the checksum of {damaged} is wrong; {OTHER_COPY}')


def load(path: str, device: str = 'cpu', mapped: bool = False) -> dict:
    """
    The checkpoint at `path` (a file, or a folder with ckpt.pt) as a dict, tensors on `device`. 'config' and 'tokenizer'
    are {} where it has none; other keys may be missing or None.

    mapped: tensors are memory-mapped, so the optimizer's take no memory where only the model is used. UserError where
    the file is missing, damaged or no checkpoint, holds more than tensors and plain values, or is not as TYPES says.
    """
    file = find(path)
    check_sums(file)
    try:
        with torch.serialization.safe_globals([(stands, name) for name, stands in NUMPY.items()]):
            checkpoint = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:
        # a truncated file fails in many ways, all with the same meaning for the user
        if 'weights_only' in str(error) or 'Unsupported' in str(error):
            hint = 'only load checkpoints saved by this project or nanoGPT'
            raise UserError(f'{file} holds more than tensors and plain values: it could run code; {hint}') from error
        raise UserError(f'{file} is truncated or not a checkpoint; {OTHER_COPY}') from error
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= set(checkpoint):
        raise UserError(f"{file} is no GPT checkpoint: it lacks 'model' or 'model_args'; name one that train.py wrote")
    for name, kinds in TYPES.items():
        value = checkpoint.get(name)
        if not isinstance(value, kinds) and (value is not None or name in ('model', 'model_args')):
            raise UserError(f"{file} is damaged: its '{name}' is a {type(value).__name__}; {OTHER_COPY}")
        if isinstance(value, torch.Tensor) and (value.numel() != 1 or value.is_complex()):
            raise UserError(f"{file} is damaged: its '{name}' is not one number; {OTHER_COPY}")
    for name in ('iter_num', 'tokens'):
        if not 0 <= (checkpoint.get(name) or 0) < 1 << 63:
            raise UserError(f'{file} is damaged: its {name} is {checkpoint[name]}; {OTHER_COPY}')
    for name in ('config', 'tokenizer'):
        checkpoint[name] = checkpoint.get(name) or {}
    tensors = checkpoint['model'].items()
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors):
        raise UserError(f"{file} is damaged: its 'model' holds more than named tensors; {OTHER_COPY}")
    return checkpoint
