"""
The optimizers: AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

Sources: Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW); Jordan et al. 2024, kellerjordan.github.io/posts/muon
(Muon); Liu et al. 2025, arXiv:2502.16982 (one learning rate and one weight decay for both).
"""

import torch

from core.cli.errors import UserError


def adamw(named, weight_decay, learning_rate, betas, device_type):
    """
    AdamW in two groups: matrices and embeddings decay, biases and norm gains don't. Fused where PyTorch has that.

    named: pairs of name and parameter; parameters that need no gradient are left out. device_type: 'cpu', 'cuda', ...
    """
    parameters = [parameter for _, parameter in named if parameter.requires_grad]
    groups = [
        {'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
        {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu'))


class Muon(torch.optim.Optimizer):
    """
    Muon for the matrices of the blocks, AdamW for embeddings, biases and norm gains, as one optimizer.

    Muon replaces each matrix's momentum by the nearest orthogonal matrix, so that a step is equally large in all
    directions. It is scaled to the root mean square of AdamW's usual steps (arXiv:2502.16982, eq. 4), so AdamW's
    learning rate and weight decay serve both. Arguments as for `adamw`. Under FSDP, PyTorch gathers each matrix for its
    Newton-Schulz iteration.
    """

    def __init__(self, named, weight_decay, learning_rate, betas, device_type):
        named = list(named)
        matrices = [p for name, p in named if is_block_matrix(name, p) and p.requires_grad]
        rest = [(name, p) for name, p in named if not is_block_matrix(name, p)]
        self.muon = torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn='match_rms_adamw'
        )
        self.adamw = adamw(rest, weight_decay, learning_rate, betas, device_type)
        super().__init__(self.muon.param_groups + self.adamw.param_groups, {})

    @torch.no_grad()
    def step(self):
        """One step of both. Groups and state are this optimizer's: load_state_dict replaces them."""
        for part, groups in ((self.muon, self.param_groups[:1]), (self.adamw, self.param_groups[1:])):
            part.param_groups, part.state = groups, self.state
            part.step()


def is_block_matrix(name, parameter):
    """True for the weight matrices of attention and MLP."""
    return '.h.' in name and parameter.dim() == 2


def slow_down(optimizer, parts, share):
    """
    Let parts of parameters learn at a share of the learning rate: after each step they have moved that share of it.

    Steps of AdamW and Muon, decay included, are proportional to the learning rate, so this is a rate of their own.
    parts: pairs of a parameter and a slice of its rows. UserError for some rows of a sharded parameter.
    """
    views = [p.detach() if rows == slice(None) else p.detach()[rows] for p, rows in parts]
    if any(view.shape != p.shape and hasattr(p, 'full_tensor') for view, (p, _) in zip(views, parts, strict=True)):
        raise UserError('kv_lr slows down some rows of a matrix of MHA, which fsdp shards; train it without fsdp')
    before = []

    def remember(*_):
        before[:] = [view.clone() for view in views]

    def shorten(*_):
        for view, old in zip(views, before, strict=True):
            view.lerp_(old, 1 - share)
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(shorten)


OPTIMIZERS = {'adamw': adamw, 'muon': Muon}


def moments(group):
    """Names of what an optimizer remembers of each parameter of a group, tensors of the parameter's shape."""
    return ('exp_avg', 'exp_avg_sq') if 'betas' in group else ('momentum_buffer',)
