"""
The optimizers: AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

A model is known here by its parameters' names and by `parts`, a function that divides the rows of a fused matrix:
parts('transformer.h.0.attn.c_attn.weight') -> {'q': slice(0, C), 'k': slice(C, 2C), 'v': slice(2C, 3C)}, {} for others.

Sources: Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW); Jordan et al. 2024, kellerjordan.github.io/posts/muon
(Muon); Liu et al. 2025, arXiv:2502.16982 (one learning rate and one weight decay for both).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

Named = Iterable[tuple[str, torch.nn.Parameter]]
Rows = dict[str, slice]  # of a parameter, by its name
Betas = tuple[float, float]
Parts = Callable[[str], Rows]  # the parts of a fused matrix, by its name


def kv_rows(named: Named, parts: Parts) -> Rows:
    """The rows of each weight from which keys and values are computed: {name: rows}."""
    rows = {}
    for name, _ in named:  # 'kv' is what makes MLA's latent
        if found := [where for part, where in parts(name).items() if part in ('k', 'v', 'kv')]:
            rows[name] = slice(found[0].start, found[-1].stop)
    return rows


def param_groups(named: Named, weight_decay: float, slow: Rows | None = None, share: float = 1.0) -> list[dict]:
    """
    Matrices and embeddings, which decay; biases and norm gains, which don't; and the matrices that learn slowly.

    A group's `lr_scale` multiplies the learning rate. The third group, with lr_scale=share, holds the parameters all of
    whose rows are in `slow`; it is left out where there are none. (For parameters that are slowed in part see
    `slow_down`.) Parameters that need no gradient are left out.
    """
    named = [(name, p) for name, p in named if p.requires_grad]
    slow = slow if slow and share != 1 else {}
    whole = {name for name, p in named if name in slow and is_whole(slow[name], p)}
    groups = [
        dict(params=[(n, p) for n, p in named if p.dim() >= 2 and n not in whole], weight_decay=weight_decay),
        dict(params=[(n, p) for n, p in named if p.dim() < 2], weight_decay=0.0),
    ]
    if whole:
        groups.append(dict(params=[(n, p) for n, p in named if n in whole], weight_decay=weight_decay, lr_scale=share))
    return groups


def is_whole(rows: slice, parameter: torch.Tensor) -> bool:
    """True where `rows` are all rows of a parameter."""
    return range(parameter.size(0))[rows] == range(parameter.size(0))


def no_parts(name: str) -> Rows:
    """No matrix is divided."""
    return {}


def adamw(
    groups: list[dict], learning_rate: float, betas: Betas, device_type: str, parts: Parts = no_parts
) -> torch.optim.AdamW:
    """AdamW of `param_groups`, fused where PyTorch has that. device_type: 'cpu', 'cuda'; `parts` changes nothing."""
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu'))


class Muon(torch.optim.Optimizer):
    """
    Muon for the matrices of the blocks, AdamW for embeddings, biases and norm gains, as one optimizer.

    Muon replaces each matrix's momentum by the nearest orthogonal matrix, so that a step is equally large in all
    directions. It is scaled to the root mean square of AdamW's usual steps (arXiv:2502.16982, eq. 4), so AdamW's
    learning rate and weight decay serve both. A fused matrix is divided into its `parts` first: as one matrix, how far
    its queries move would depend on its keys and values. Under FSDP each process gathers the momentum of one matrix
    after the other.
    """

    def __init__(
        self, groups: list[dict], learning_rate: float, betas: Betas, device_type: str, parts: Parts = no_parts
    ):
        """groups: those of `param_groups`. The default of `parts` orthogonalizes fused matrices as a whole."""
        muon: list[dict] = []
        rest: list[dict] = []
        for group in groups:
            for chosen, is_mine, more in ((muon, True, {'momentum': 0.95}), (rest, False, {})):
                if params := [one for one in group['params'] if is_block_matrix(*one) == is_mine]:
                    chosen.append({**group, 'params': params, **more})
        self.parts = parts
        self.adamw = adamw(rest, learning_rate, betas, device_type)
        super().__init__(muon + self.adamw.param_groups, {'lr': learning_rate})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of both. Groups and state are this optimizer's: load_state_dict replaces them."""
        for group in self.param_groups:
            if 'momentum' in group:
                for name, parameter in zip(group['param_names'], group['params'], strict=True):
                    if parameter.grad is not None:
                        self.step_matrix(parameter, group, list(self.parts(name).values()))
        self.adamw.param_groups = [group for group in self.param_groups if 'betas' in group]
        self.adamw.state = self.state
        self.adamw.step()

    def step_matrix(self, parameter: Any, group: dict, parts: list[slice]) -> None:
        """Muon's step of one matrix, part by part."""
        state, momentum, lr, grad = self.state[parameter], group['momentum'], group['lr'], parameter.grad
        if 'momentum_buffer' not in state:
            state['momentum_buffer'] = torch.zeros_like(grad)
        state['momentum_buffer'].lerp_(grad, 1 - momentum)
        update = grad.lerp(state['momentum_buffer'], momentum)  # Nesterov's
        update = update.full_tensor() if hasattr(update, 'full_tensor') else update
        parameter.mul_(1 - lr * group['weight_decay'])
        for rows in parts or [slice(0, parameter.size(0))]:
            part = orthogonalized(update[rows])
            mine, here = local_rows(parameter, rows)
            mine.add_(part[here], alpha=-lr * (0.2 * math.sqrt(max(part.shape))))


def orthogonalized(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """
    A matrix with nearly the nearest orthogonal one's values: its singular values become about 1; in bfloat16.

    Newton-Schulz iteration with the quintic coefficients of kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.775, 2.0315
    wide = matrix.size(0) <= matrix.size(1)
    x = (matrix if wide else matrix.T).bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


def is_block_matrix(name: str, parameter: torch.Tensor) -> bool:
    """True for the weight matrices of attention and MLP."""
    return '.h.' in name and parameter.dim() == 2


def local_rows(parameter: Any, rows: slice) -> tuple[torch.Tensor, slice]:
    """
    A view of those of a parameter's `rows` that this process holds, and where they stand among `rows`.

    All of them, unless FSDP shards the parameter: then each process holds an equal run of consecutive rows.
    """
    values = parameter.detach()
    if not hasattr(parameter, 'full_tensor'):
        return values[rows], slice(0, rows.stop - rows.start)
    mesh, local = parameter.device_mesh, values.to_local()
    first = min(mesh.get_local_rank() * -(-parameter.size(0) // mesh.size()), parameter.size(0))
    start = max(first, rows.start)
    stop = max(start, min(first + local.size(0), rows.stop))
    return local[start - first : stop - first], slice(start - rows.start, stop - rows.start)


def slow_down(optimizer: torch.optim.Optimizer, named: Named, slow: Rows, share: float) -> None:
    """
    Let parts of matrices learn at a share of the learning rate: after each step their rows have moved that share of it.

    Steps of AdamW and Muon, decay included, are proportional to the learning rate, so this is a rate of their own, as
    `param_groups` gives it to whole matrices, which are left to it.
    """
    views = [local_rows(p, slow[name])[0] for name, p in named if name in slow and not is_whole(slow[name], p)]
    before: list[torch.Tensor] = []

    def remember(*_):
        before[:] = [view.clone() for view in views]

    def shorten(*_):
        for view, old in zip(views, before, strict=True):
            view.lerp_(old, 1 - share)
        before.clear()

    if views and share != 1:
        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(shorten)


OPTIMIZERS = {'adamw': adamw, 'muon': Muon}


def moments(group: dict) -> tuple[str, ...]:
    """Names of what an optimizer remembers of each parameter of a group, tensors of the parameter's shape."""
    return ('exp_avg', 'exp_avg_sq') if 'betas' in group else ('momentum_buffer',)
