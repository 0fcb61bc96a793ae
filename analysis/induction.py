"""
Induction heads of a model: test sequences, scores, controls and ablations. Arrays in, arrays out, no files.

An induction head (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022,
arXiv:2209.11895) continues a repeated sequence: from the current token it attends to the token that followed the
earlier occurrence, and copies it. This takes two layers: a previous-token head writes each token's predecessor into the
residual stream, and the induction head matches the current token against it.

Notable features:
- the same measurements for GPT, MLAGPT and HFModel, a few sequences at a time
- exact on known patterns: a perfect head scores 1.000, uniform attention scores chance (tests/analysis)
- every score is returned per sequence, for confidence intervals over sequences (stats.bootstrap)

Shapes: N sequences, B of them in a batch, T tokens, Q scored queries per sequence, L layers, H heads, C width, d head
size. Positions are 0-based. Losses are in nats. Models must be in eval mode.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from analysis import forward, stats
from analysis.bigrams import repeated_pairs
from analysis.forward import Model, device_of, token_losses
from analysis.hf_model import Seen

Scores = dict[str, np.ndarray]
Heads = list[tuple[int, int]]  # (layer, head)

SCORES = ('induction', 'prefix_matching', 'duplicate_token', 'previous_token', 'sink')


# ---- repeated sequences ----------------------------------------------------------------------------------------------


@dataclass
class Repeats:
    """Sequences with a repeated block, and the positions in later copies with their counterparts one copy earlier."""

    tokens: Tensor  # (N, T) int64
    query: Tensor  # (N, Q) positions in the later copies
    match: Tensor  # (N, Q) the same place one copy earlier

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> 'Repeats':
        return Repeats(self.tokens[rows], self.query[rows], self.match[rows])

    def to(self, device: torch.device) -> 'Repeats':
        """The same on another device."""
        return Repeats(self.tokens.to(device), self.query.to(device), self.match.to(device))

    def batches(self, batch_size: int, device: torch.device) -> Iterator['Repeats']:
        """Yields the sequences in batches of `batch_size`, on `device`."""
        for first in range(0, len(self), batch_size):
            yield self[first : first + batch_size].to(device)


def repeated_sequences(
    count: int,
    length: int,
    ids: Sequence[int] | np.ndarray,
    *,
    bos: int | None = None,
    copies: int = 2,
    max_gap: int = 0,
    shuffled: bool = False,
    seed: int = 0,
) -> Repeats:
    """
    `count` sequences [BOS] x x ..., where x is a block of `length` distinct random tokens of `ids`, on the CPU.

    bos: the id at position 0, or None. copies: of x. max_gap: number of further distinct tokens; a random part of them
    goes between the two copies and the rest before the first, so distance and positions vary (two copies only).
    shuffled: a control in which each later copy has its own random order; query and match are as without it, so only
    heads that attend by position score. Raises ValueError if there are too few ids.
    """
    ids = np.asarray(ids)
    if length + max_gap > len(ids):
        raise ValueError(f'a sequence requires {length + max_gap} distinct tokens, but only {len(ids)} ids were given')
    rng = np.random.default_rng([seed, length, copies, max_gap])
    drawn = np.stack([rng.choice(ids, length + max_gap, replace=False) for _ in range(count)])
    between = rng.integers(0, max_gap + 1, count)
    block, filler = drawn[:, :length], drawn[:, length:]
    later = [rng.permuted(block, axis=1) if shuffled else block for _ in range(copies - 1)]
    head = np.full((count, 0 if bos is None else 1), bos or 0)
    rows = [
        np.concatenate([head[n], filler[n, gap:], block[n], filler[n, :gap], *(copy[n] for copy in later)])
        for n, gap in enumerate(between)
    ]
    first = head.shape[1] + max_gap - between[:, None] + np.arange(length * (copies - 1))
    tokens, match = torch.from_numpy(np.stack(rows)).long(), torch.from_numpy(first)
    return Repeats(tokens, match + length + torch.from_numpy(between[:, None]), match)


def layouts(length: int, room: int, n_ids: int) -> dict[str, dict[str, int]]:
    """
    Arguments of repeated_sequences by name: 'main', and others that test whether scores depend on the layout.

    length: of the block in 'main', shortened to fit room, the longest sequence in tokens, and n_ids, the number of ids.
    Raises ValueError if no block of 4 tokens fits.
    """
    L = min(length, room // 2, n_ids)
    if L < 4:
        raise ValueError(f"{room} tokens and {n_ids} ids don't suffice for a repeated block of 4 distinct tokens")
    half = max(2, L // 2)
    gap = min(half, room - 2 * half, n_ids - half)
    found = {'main': dict(length=L), 'short': dict(length=half)}
    if gap > 0:
        found['random gap'] = dict(length=half, max_gap=gap)
    found['four copies'] = dict(length=max(2, L // 4), copies=4)
    return found


def chance(repeats: Repeats) -> float:
    """The induction score of uniform attention: the mean over queries i of 1/(i+1)."""
    return (1.0 / (repeats.query.double() + 1)).mean().item()


def repeat_losses(model: Model, hidden: Tensor, repeats: Repeats) -> Tensor:
    """Losses (B, Q-1) of the tokens that the repetition makes predictable, given ln_f's output hidden (B, T, C)."""
    rows = torch.arange(len(repeats), device=hidden.device)[:, None]
    query = repeats.query[:, :-1]  # the last token has no successor in the sequence
    return token_losses(model, hidden[rows, query], repeats.tokens[rows, query + 1])


def in_context_positions(targets: Tensor) -> tuple[int, int] | None:
    """
    Early and late token of the in-context score, the late one's loss minus the early one's: negative, context helps.

    For targets (N, T), counted from 1: 50 and 500, or T/10 and T in shorter windows; None if they are too short. The
    early one comes after all masked targets (-1): tokens that were never trained on have meaningless losses.
    """
    T = targets.size(1)
    early, late = (50, 500) if T >= 500 else (max(2, T // 10), T)
    masked = (targets == -1).any(0).nonzero().flatten()
    if len(masked):
        early = max(early, int(masked[-1]) + 3)  # the target of column i is token i + 2, counted from 1
    return (early, late) if early < late else None


# ---- scores ----------------------------------------------------------------------------------------------------------


def pattern_scores(pattern: Tensor, repeats: Repeats) -> dict[str, Tensor]:
    """
    The scores (B, H) of one layer's heads, from its patterns (B, H, T, T) on repeats.

    With A a pattern and i a query in a later copy:
      induction        mean_i A[i, match(i) + 1]: attention to the token after the counterpart one copy earlier
      prefix_matching  mean_i sum of A[i, j + 1] over all earlier j with the same token (arXiv:2209.11895)
      duplicate_token  mean_i A[i, match(i)]
      previous_token   mean over all i >= 1 of A[i, i - 1]
      sink             mean over all i >= 1 of A[i, 0]: attention to the first token, whatever it is
    """
    tokens, query, match = repeats.tokens, repeats.query, repeats.match
    T = tokens.size(1)
    sequence = torch.arange(len(tokens), device=tokens.device)[:, None]
    rows = pattern[sequence, :, query]  # (B, Q, H, T)
    earlier = torch.arange(T, device=tokens.device) < query[..., None]
    same = (tokens[sequence, query][..., None] == tokens[:, None]) & earlier  # (B, Q, T)
    prefix = torch.einsum('bqht,bqt->bqh', rows[..., 1:], same[..., :-1].to(rows.dtype))
    return {
        'induction': pattern[sequence, :, query, match + 1].mean(1),
        'prefix_matching': prefix.mean(1),
        'duplicate_token': pattern[sequence, :, query, match].mean(1),
        'previous_token': pattern.diagonal(-1, 2, 3).mean(-1),
        'sink': pattern[:, :, 1:, 0].mean(-1),
    }


def natural_scores(pattern: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """
    The scores (B, H) of one layer's heads on text (B, T), from their patterns (B, H, T, T).

    Over the positions i whose token occurred before in the window, with j all its earlier positions:
      induction        mean_i sum_j A[i, j + 1]
      duplicate_token  mean_i sum_j A[i, j]
      previous_token   mean over all i >= 1 of A[i, i - 1]
      sink             mean over all i >= 1 of A[i, 0]: attention to the first token, whatever it is
    The first two are NaN for a window without a token that occurs twice.
    """
    same = (tokens[:, :, None] == tokens[:, None]).tril(-1)  # (B, i, j)
    follows = F.pad(same, (1, -1))  # (B, i, j + 1)
    queries = same.any(-1).sum(-1, keepdim=True)  # other rows add nothing to the sums
    return {
        'induction': (pattern * follows[:, None]).sum((-1, -2)) / queries,
        'duplicate_token': (pattern * same[:, None]).sum((-1, -2)) / queries,
        'previous_token': pattern.diagonal(-1, 2, 3).mean(-1),
        'sink': pattern[:, :, 1:, 0].mean(-1),
    }


def uniform_pattern(T: int) -> Tensor:
    """Uniform attention over T tokens: (T, T)."""
    return torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]


@torch.no_grad()
def text_scores(model: Model, tokens: Tensor) -> tuple[Scores, Scores]:
    """`natural_scores` of all heads on windows of text (N, T), each (N, L, H), and those of uniform attention, (N,)."""

    def scores(window: Tensor) -> dict[str, Tensor]:
        return score_layers(model, window, lambda layer, a: natural_scores(a.pattern, window))[1]

    uniform = uniform_pattern(tokens.size(1))[None, None]
    chances = [{name: value[:, 0] for name, value in natural_scores(uniform, t).items()} for t in tokens.split(1)]
    return joined([scores(window.to(device_of(model))) for window in tokens.split(1)]), joined(chances)


def score_layers(
    model: Model, tokens: Tensor, score: Callable[[int, Seen], dict[str, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One pass over ids (B, T): ln_f's output (B, T, C), and each layer's score(layer, Seen) (B, H): (B, L, H), CPU."""
    layers: list[dict[str, Tensor]] = []
    hidden = forward.run(model, tokens, visit=lambda layer, a: layers.append(score(layer, a)))
    return hidden, {name: torch.stack([layer[name] for layer in layers], dim=1).cpu() for name in layers[0]}


def joined(parts: list[dict[str, Tensor]]) -> Scores:
    """Dicts of tensors, one per batch, concatenated into one dict of float32 arrays."""
    return {name: torch.cat([part[name] for part in parts]).float().numpy() for name in parts[0]}


@torch.no_grad()
def head_scores(model: Model, repeats: Repeats, batch_size: int = 16, losses: bool = True) -> Scores:
    """
    Every head's scores on every sequence: a float32 array (N, L, H) for each of SCORES.

    With losses=True also 'losses' (N, T-1), of predicting each token but the first, and 'repeat_loss' (N,), the mean
    over the tokens that the repetition makes predictable.
    """

    def of_batch(part: Repeats) -> dict[str, Tensor]:
        hidden, scores = score_layers(model, part.tokens, lambda layer, a: pattern_scores(a.pattern, part))
        if losses:
            loss = token_losses(model, hidden[:, :-1], part.tokens[:, 1:])
            scores.update(losses=loss.cpu(), repeat_loss=loss.gather(1, part.query[:, :-1]).mean(1).cpu())
        return scores

    return joined([of_batch(part) for part in repeats.batches(batch_size, device_of(model))])


def ranked(scores: np.ndarray) -> Heads:
    """Heads as a list of (layer, head) by descending score; scores (L, H)."""
    return [divmod(int(n), scores.shape[1]) for n in np.argsort(-scores, axis=None)]


def verdict(low: np.ndarray, random_null: float, shuffled_high: np.ndarray, copying: np.ndarray) -> np.ndarray:
    """
    Which heads are induction heads: bool (L, H), from arrays (L, H).

    low: lower bound of the induction score, on sequences that didn't select the head. random_null: the highest score of
    any untrained head. shuffled_high: upper bound of the score with a shuffled second copy. copying: by eigenvalues.
    """
    return (low > random_null) & (low > shuffled_high) & (copying > 0)


def calls(measured: dict) -> dict[str, np.ndarray]:
    """Which heads are called what, {score: bool (L, H)}: by `verdict`, or surely above any untrained head."""
    found = {'induction': measured['called']}
    for name in ('previous_token', 'duplicate_token', 'sink'):
        found[name] = measured[name]['low'] > measured['nulls'][name]
    return found | {'copying': measured['copying_eigenvalues'] > measured['nulls']['copying']}


def is_untrained(model: Model) -> bool:
    """True if every norm gain and every bias is exactly 0 or exactly 1: the initial values, which training changes."""
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return bool(vectors) and all(bool((p == 0).all() or (p == 1).all()) for p in vectors)


# ---- ablations -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ablate_each_head(model: Model, repeats: Repeats, name: str = '') -> tuple[np.ndarray, np.ndarray]:
    """
    The loss on repeated tokens without ablation and with each head mean-ablated: arrays (N,) and (L, H, N).

    A head's output is replaced by its mean over sequences at each position: information about the position stays,
    information about tokens is removed. name: of the progress bar.
    """
    repeats = repeats.to(device_of(model))
    tokens = repeats.tokens
    x: Any = None  # the residual stream at the input of the layer
    ablated = np.zeros((model.config.n_layer, model.config.n_head, len(repeats)), dtype=np.float32)
    for layer in tqdm(range(model.config.n_layer), desc=name, leave=False, disable=None):
        for head in range(model.config.n_head):
            hidden = forward.run(model, tokens, x, layer, edit=forward.replacing_heads([(layer, head)]))
            ablated[layer, head] = repeat_losses(model, hidden, repeats).mean(1).float().cpu()
        x = forward.run(model, tokens, x, layer, layer + 1)  # after the last layer: the output of the last norm
    return repeat_losses(model, x, repeats).mean(1).float().cpu().numpy(), ablated


@torch.no_grad()
def ablate_together(model: Model, repeats: Repeats, heads: Heads) -> np.ndarray:
    """The loss on repeated tokens (N,) with all `heads` mean-ablated at once."""
    repeats = repeats.to(device_of(model))
    hidden = forward.run(model, repeats.tokens, edit=forward.replacing_heads(heads))
    return repeat_losses(model, hidden, repeats).mean(1).float().cpu().numpy()


def matched_heads(heads: Heads, n_head: int, rng: np.random.Generator) -> Heads:
    """Random heads outside `heads`, as many from each layer; fewer if a layer has too few others."""
    drawn: Heads = []
    for layer in sorted({layer for layer, _ in heads}):
        taken = {head for other, head in heads if other == layer}
        free = [head for head in range(n_head) if head not in taken]
        drawn += [(layer, int(head)) for head in rng.choice(free, min(len(free), len(taken)), replace=False)]
    return drawn


def ablate_cumulatively(
    model: Model, repeats: Repeats, ranking: Heads, counts: Iterable[int], draws: int = 4, seed: int = 0
) -> list[dict]:
    """
    How much the loss on repeated tokens rises with the first k heads of `ranking` ablated, for each k of `counts`.

    Several at once, since other heads with the same function can make up for one. Each dict has heads (k), rise, and of
    random other heads of the same layers control_rise, a mean over `draws`, and control_heads, their number: below k
    where a layer has too few, which makes control_rise a lower bound.
    """
    rng, base, out = np.random.default_rng(seed), ablate_together(model, repeats, []), []
    for k in counts:
        controls = [matched_heads(ranking[:k], model.config.n_head, rng) for _ in range(draws)]
        mine, *theirs = (ablate_together(model, repeats, heads) - base for heads in (ranking[:k], *controls))
        rises = dict(rise=mine.mean(), control_rise=np.stack(theirs).mean())
        out.append(dict(heads=k, control_heads=len(controls[0]), **rises))
    return out


# ---- natural text ----------------------------------------------------------------------------------------------------


def bigram_losses(losses: np.ndarray, tokens: Tensor) -> dict:
    """
    Losses (N, T-1) on tokens (N, T), where the bigram occurred earlier in the window and elsewhere.

    Means 'repeated', 'others' and their difference 'gain', each a dict of mean, low and high (95 % over windows), and
    the 'share' of repeated positions. The gain isn't all induction: bigrams that repeat are common ones too. What it is
    before heads form is the measure of that.
    """
    again = repeated_pairs(tokens[:, :-1].numpy(), tokens[:, 1:].numpy())
    repeated, others = (((losses * where).sum(1, dtype=float), where.sum(1)) for where in (again, ~again))
    gain = stats.ratio_difference(*others, *repeated)
    found = dict(repeated=stats.ratio(*repeated), others=stats.ratio(*others), gain=gain)
    half = stats.half_width(len(losses)) if len(losses) > 1 else float('nan')
    around = {name: dict(mean=m, low=m - half * e, high=m + half * e) for name, (m, e) in found.items()}
    return around | dict(share=float(again.mean()))


@torch.no_grad()
def ablate_on_text(
    model: Model, tokens: Tensor, ranking: Heads, counts: Iterable[int], draws: int = 4, seed: int = 0
) -> list[dict]:
    """
    What the first k heads of `ranking` are worth on windows of text (N, T), for each k of `counts`: a list of dicts.

    Each has heads (k), the rises of `bigram_losses` 'repeated' and 'others' with these heads mean-ablated, and as in
    `ablate_cumulatively` 'control_repeated', 'control_others' and control_heads.
    """
    means, rng = forward.head_means(model, tokens), np.random.default_rng(seed)
    base, out = forward.text_losses(model, tokens), []

    def rise(heads):
        edit = forward.replacing_heads(heads, means)
        return bigram_losses(forward.text_losses(model, tokens, edit=edit) - base, tokens)

    for k in counts:
        controls = [matched_heads(ranking[:k], model.config.n_head, rng) for _ in range(draws)]
        mine, *theirs = (rise(heads) for heads in (ranking[:k], *controls))
        row: dict = dict(heads=k, control_heads=len(controls[0]))
        for name in ('repeated', 'others'):
            row |= {name: mine[name], f'control_{name}': float(np.mean([found[name]['mean'] for found in theirs]))}
        out.append(row)
    return out
