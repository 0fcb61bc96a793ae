"""Checks of tensors."""

import torch


def not_finite(state: dict[str, torch.Tensor]) -> str | None:
    """The name of the first tensor in {name: tensor} that has an infinity or NaN, or None."""
    return next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)
