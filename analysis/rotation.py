"""
What the rotated and the other dimensions of queries and keys contribute to a head, by replacing one of the two.

An attention logit under RoPE on a part of the dimensions is a sum: q . k over the dimensions that are not rotated
(content), and over those that are. For MHA, GQA and MLA alike. Shapes: B batch, T tokens.
"""

import torch
from torch import Tensor

from analysis.forward import Attention, device_of, run
from analysis.induction import Repeats, pattern_scores, repeat_losses
from model import GPT, apply_rope

PARTS = ('content', 'rotated')
REPLACEMENTS = ('mean by distance', 'not rotated', 'mean')


def logit_parts(attention: Attention, head: int, scale: float, rope: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """
    A head's attention logits (B, T, T) by part, without 'content' where all dimensions are rotated; and what the
    rotated part would be if neither query nor key had been rotated.

    rope: the table (2, T, R/2) that rotated the last R dimensions.
    """
    q, k = attention.q[:, head] * scale, attention.k[:, head]
    (still_q, turned_q), (still_k, turned_k) = (
        t.tensor_split((t.size(-1) - 2 * rope.size(-1),), dim=-1) for t in (q, k)
    )
    parts = {'content': still_q @ still_k.mT, 'rotated': turned_q @ turned_k.mT}
    back = torch.stack((rope[0], -rope[1]))
    flat = apply_rope(turned_q, back) @ apply_rope(turned_k, back).mT
    return {name: logits for name, logits in parts.items() if name == 'rotated' or still_q.size(-1)}, flat


def mean_by_distance(logits: Tensor) -> Tensor:
    """Causal logits (B, T, T) with each replaced by the mean over all pairs at its distance, of all sequences."""
    T = logits.size(-1)
    position = torch.arange(T, device=logits.device)
    distance = (position[:, None] - position).clamp(min=0)
    visible = position[:, None] >= position
    sums = torch.zeros(T, dtype=logits.dtype, device=logits.device)
    sums.index_add_(0, distance[visible], logits.mean(0)[visible])
    return (sums / (T - position))[distance].expand_as(logits)


@torch.no_grad()
def replace_logits(model: GPT, repeats: Repeats, at: tuple[int, int], score: str) -> dict[str, dict[str, dict]]:
    """
    What becomes of the head (layer, head) if a part of its logits is replaced.

    Returns {part: {replacement: {'score', 'rise'}}}: its score of that name (see `pattern_scores`), and the rise of the
    loss on repeats in nats. A part is replaced by its mean at each distance, by its mean over the keys in sight (which
    the softmax drops), and the rotated part by its value without rotation. The model has RoPE and is in eval mode.
    """
    (layer, head), repeats = at, repeats.to(device_of(model))
    seen: dict[int, Attention] = {}

    def keep(n: int, attention: Attention) -> None:
        if n == layer:
            seen[n] = attention

    x = run(model, repeats.tokens, None, 0, layer) if layer else None  # the layer's input, where each change starts
    hidden = run(model, repeats.tokens, x, layer, visit=keep)
    before = repeat_losses(model, hidden, repeats).mean()
    T = repeats.tokens.size(1)
    parts, flat = logit_parts(seen[layer], head, model.transformer.h[layer].attn.scale, model.rope[:, :T])
    hidden_keys = torch.ones(T, T, dtype=torch.bool, device=hidden.device).triu(1)
    out: dict[str, dict[str, dict]] = {}
    for part, logits in parts.items():
        choices = dict(zip(REPLACEMENTS, (mean_by_distance(logits), flat, torch.zeros_like(logits)), strict=True))
        if part == 'content':
            del choices['not rotated']
        out[part] = {}
        for how, instead in choices.items():
            pattern = (sum(parts.values()) - logits + instead).masked_fill(hidden_keys, float('-inf')).softmax(-1)
            output = (pattern @ seen[layer].v[:, head])[:, None]

            def edit(n: int, z: Tensor, output: Tensor = output) -> Tensor:
                return torch.cat((z[:, :head], output, z[:, head + 1 :]), dim=1) if n == layer else z

            changed = run(model, repeats.tokens, x, layer, edit=edit)
            rise = repeat_losses(model, changed, repeats).mean() - before
            found = pattern_scores(pattern[:, None], repeats)[score].mean()
            out[part][how] = dict(score=float(found), rise=float(rise))
    return out
