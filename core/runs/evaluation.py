"""
The loss of a model on a fixed set of windows, the same for every model (see TokenData.eval_windows), so that losses can
be compared window by window: the one evaluation loop, for training, conversion and comparison.
"""

import contextlib
import math
from contextlib import AbstractContextManager

import torch

from core.cli.machine import to_device
from core.runs.processes import Processes
from core.text.dataset import TokenData
from model import GPT


@torch.no_grad()
def window_losses(
    model: GPT,
    data: TokenData,
    split: str,
    count: int,
    batch_size: int,
    autocast: AbstractContextManager | None = None,
    processes: Processes | None = None,
) -> torch.Tensor:
    """
    The loss of each window in nats per token, in eval mode, float64 on the CPU: of all windows, or of this process's
    share. count: windows at most, `batch_size` at a time on each process; autocast: a context to compute in.
    """
    processes = processes or Processes()
    training, device = model.training, model.transformer.wte.weight.device
    model.eval()
    starts, losses = data.eval_windows(split, count), []
    for first in range(0, len(starts), batch_size * processes.world_size):
        mine = starts[first + processes.rank : first + batch_size * processes.world_size : processes.world_size]
        # a sharded model needs every process in every pass, even one that has no window left
        x, y = to_device(*data.windows(split, mine if len(mine) else starts[:1]), device)
        with autocast or contextlib.nullcontext():
            losses.append(model.window_losses(x, y)[: len(mine)].cpu())
    model.train(training)
    return torch.cat(losses).double()


def mean_and_stderr(losses: torch.Tensor, processes: Processes | None = None) -> tuple[float, float]:
    """Mean of losses (n,) and its standard error, floats; over all processes together where they each have a share."""
    sums = torch.stack((torch.tensor(len(losses), dtype=torch.float64), losses.sum(), losses.square().sum()))
    count, total, squares = (processes or Processes()).sum(sums).tolist()
    mean = total / count
    variance = max(0.0, squares / count - mean**2) * count / max(1.0, count - 1)
    return mean, math.sqrt(variance / count)
