"""
The optimizers: AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

Sources: Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW); Jordan et al. 2024, kellerjordan.github.io/posts/muon
(Muon); Liu et al. 2025, arXiv:2502.16982 (one learning rate and one weight decay for both).
"""

import torch


def by_share(named, learning_rate, share_of):
    """
    Groups of pairs of name and parameter: those that learn at the whole learning rate, then one for each other share.

    share_of: function of a name. A share other than 1 is the group's 'lr_share': who sets its 'lr' multiplies by that.
    """
    groups = [{'params': [parameter for name, parameter in named if share_of(name) == 1]}]
    for share in sorted({share_of(name) for name, _ in named} - {1}):
        own = [parameter for name, parameter in named if share_of(name) == share]
        groups.append({'params': own, 'lr': share * learning_rate, 'lr_share': share})
    return groups


def adamw(named, weight_decay, learning_rate, betas, device_type, share_of):
    """
    AdamW in two groups: matrices and embeddings decay, biases and norm gains don't. Fused where PyTorch has that.

    named: pairs of name and parameter; parameters that need no gradient are left out. device_type: 'cpu', 'cuda', ...
    share_of: see `by_share`.
    """
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups = by_share([(name, p) for name, p in named if p.dim() >= 2], learning_rate, share_of)
    groups.append({'params': [p for _, p in named if p.dim() < 2], 'weight_decay': 0.0})
    fused = device_type in ('cuda', 'cpu')
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused)


class Muon(torch.optim.Optimizer):
    """
    Muon for the matrices of the blocks, AdamW for embeddings, biases and norm gains, as one optimizer.

    Muon replaces each matrix's momentum by the nearest orthogonal matrix, so that a step is equally large in all
    directions. It is scaled to the root mean square of AdamW's usual steps (arXiv:2502.16982, eq. 4), so AdamW's
    learning rate and weight decay serve both. Arguments as for `adamw`. Under FSDP, PyTorch gathers each matrix for its
    Newton-Schulz iteration.
    """

    def __init__(self, named, weight_decay, learning_rate, betas, device_type, share_of):
        named = list(named)
        matrices = [(name, p) for name, p in named if is_block_matrix(name, p) and p.requires_grad]
        rest = [(name, p) for name, p in named if not is_block_matrix(name, p)]
        groups = by_share(matrices, learning_rate, share_of)
        self.muon = torch.optim.Muon(
            groups, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn='match_rms_adamw'
        )
        self.adamw = adamw(rest, weight_decay, learning_rate, betas, device_type, share_of)
        super().__init__(self.muon.param_groups + self.adamw.param_groups, {})

    @torch.no_grad()
    def step(self):
        """One step of both. Groups and state are this optimizer's: load_state_dict replaces them."""
        own = len(self.muon.param_groups)
        for part, groups in ((self.muon, self.param_groups[:own]), (self.adamw, self.param_groups[own:])):
            part.param_groups, part.state = groups, self.state
            part.step()


def is_block_matrix(name, parameter):
    """True for the weight matrices of attention and MLP."""
    return '.h.' in name and parameter.dim() == 2


OPTIMIZERS = {'adamw': adamw, 'muon': Muon}


def moments(group):
    """Names of what an optimizer remembers of each parameter of a group, tensors of the parameter's shape."""
    return ('exp_avg', 'exp_avg_sq') if 'betas' in group else ('momentum_buffer',)
