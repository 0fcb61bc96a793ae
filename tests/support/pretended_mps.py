"""
Apple's GPU, pretended on a CPU: tensors moved to 'mps' report that device and have its limits.

- no float64: neither a result nor a copy may have it, and a move to the CPU can't convert to it on the way, as PyTorch
  converts on the side of the GPU (aten/src/ATen/native/mps/operations/Copy.mm)
- operands must be on one device, except zero-dimensional tensors, indices and copies
- no NumPy array without .cpu()

As a program it runs a script on the pretended GPU:  python tests/support/pretended_mps.py train.py --device=mps ...
"""

import runpy
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ANY_DEVICE = ('__getitem__', '__setitem__', '__set__', 'copy_', '_has_compatible_shallow_copy_type')


def is_there(tensor):
    """True for a tensor on the pretended GPU."""
    return getattr(tensor, '_on_pretended_mps', False)


def put_there(tensor):
    if tensor.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    tensor._on_pretended_mps = True


def is_mps(device):
    return device is not None and torch.device(device).type == 'mps'


class PretendedMPS(TorchFunctionMode):
    """Inside this context 'mps' is a device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, '__name__', '')
        if function == torch.Tensor.device.__get__:
            return torch.device('mps:0') if is_there(args[0]) else function(*args)
        if name in ('to', 'cpu', 'double') and isinstance(args[0], torch.Tensor):
            return self.moved(name, *args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(map(is_there, tensors))
        if there and name not in ANY_DEVICE and any(t.dim() and not is_there(t) for t in tensors):
            raise RuntimeError(f'{name}: expected all tensors to be on the same device, mps:0 and cpu')
        if there and name == 'numpy':
            raise TypeError("can't convert mps:0 device type tensor to numpy; use .cpu() first")
        if name == 'copy_' and is_there(args[1]) and args[0].dtype == torch.float64:
            put_there(args[0])  # raises
        if 'device' in kwargs and kwargs['device'] is not None:
            there = is_mps(kwargs['device'])
            if there:
                kwargs['device'] = 'cpu'
        if name == 'copy_':
            there = is_there(args[0])
        out = function(*args, **kwargs)
        if name == '__set__' and isinstance(args[1], torch.Tensor) and is_there(args[1]):
            put_there(args[0])  # parameter.data = tensor, as Module.to does
        for leaf in tree_leaves(out):
            if there and isinstance(leaf, torch.Tensor):
                put_there(leaf)
        return out

    def moved(self, name, tensor, *args, copy=False, **kwargs):
        """The result of tensor.to(...), .cpu() or .double()."""
        source, like = is_there(tensor), next(iter(args), kwargs.get('other'))
        if isinstance(like, torch.Tensor):
            target, dtype = is_there(like), like.dtype
        elif name == 'to':
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
            target = source if device is None else is_mps(device)
        else:
            target, dtype = source and name != 'cpu', torch.float64 if name == 'double' else None
        dtype = dtype or tensor.dtype
        if source and dtype == torch.float64:
            put_there(torch.empty(0, dtype=dtype))  # raises
        out = tensor.to(dtype, copy=copy or source != target)
        if target:
            put_there(out)
        return out


class Generator(torch.Generator):
    """A generator for 'mps' draws on the CPU."""

    def __new__(cls, device='cpu'):
        return super().__new__(cls, 'cpu' if is_mps(device) else device)


def run(script, arguments):
    """Run a script of the repository with the pretended GPU available."""
    torch.Generator = Generator
    torch.backends.mps.is_available = lambda: True
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    with PretendedMPS():
        runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    run(sys.argv[1], sys.argv[2:])
