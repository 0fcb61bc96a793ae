"""
Induction heads of a GPT or an MLAGPT: test sequences, scores, controls and ablations. Arrays in, arrays out, no files.

An induction head (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022,
arXiv:2209.11895) continues a repeated sequence: from the current token it attends to the token that followed the
earlier occurrence, and copies it. This takes two layers: a previous-token head writes each token's predecessor into the
residual stream, and the induction head matches the current token against it.

Notable features:
- the same measurements for MHA and MLA, a few sequences at a time
- exact on known patterns: a perfect head scores 1.000, uniform attention scores chance (`self_test`)
- every score is returned per sequence, for confidence intervals over sequences (stats.bootstrap)

Shapes: N sequences, B of them in a batch, T tokens, Q scored queries per sequence, L layers, H heads, C width, d head
size. Positions are 0-based. Losses are in nats. Models must be in eval mode.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from analysis import stats
from analysis.bigrams import repeated_pairs
from analysis.forward import (
    device_of,
    embed,
    finish_block,
    head_means,
    replacing_heads,
    rope_of,
    run,
    text_losses,
    token_losses,
)
from ops.kernels import fast_attention

SCORES = ('induction', 'prefix_matching', 'duplicate_token', 'previous_token')


# ---- repeated sequences ----------------------------------------------------------------------------------------------


@dataclass
class Repeats:
    """Sequences with a repeated block, and the positions in later copies with their counterparts one copy earlier."""

    tokens: torch.Tensor  # (N, T) int64
    query: torch.Tensor  # (N, Q) positions in the later copies
    match: torch.Tensor  # (N, Q) the same place one copy earlier

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        return Repeats(self.tokens[rows], self.query[rows], self.match[rows])

    def to(self, device):
        """The same on another device."""
        return Repeats(self.tokens.to(device), self.query.to(device), self.match.to(device))

    def batches(self, batch_size, device):
        """Yields the sequences in batches of `batch_size`, on `device`."""
        for first in range(0, len(self), batch_size):
            yield self[first : first + batch_size].to(device)


def repeated_sequences(count, length, ids, *, bos=None, copies=2, max_gap=0, shuffled=False, seed=0):
    """
    `count` sequences [BOS] x x ..., where x is a block of `length` distinct random tokens: Repeats on the CPU.

    ids: token ids to draw from, without special and padding ids. bos: the id at position 0, or None. copies: number of
    copies of x. max_gap: number of further distinct tokens; a random part of them goes between the two copies and the
    rest before the first, so distance and positions vary (two copies only). shuffled: a control in which each later
    copy has the same tokens in its own random order; query and match are as without it, so only heads that attend by
    position score. Raises ValueError if there are too few ids or the arguments don't fit together.
    """
    ids = np.asarray(ids)
    if length + max_gap > len(ids):
        raise ValueError(f'a sequence requires {length + max_gap} distinct tokens, but only {len(ids)} ids were given')
    if length < 2 or copies < 2 or (max_gap and copies > 2):
        raise ValueError('length and copies must be at least 2, and max_gap requires exactly two copies')
    rng = np.random.default_rng([seed, length, copies, max_gap])
    drawn = np.stack([rng.choice(ids, length + max_gap, replace=False) for _ in range(count)])
    between = rng.integers(0, max_gap + 1, count)
    block, filler = drawn[:, :length], drawn[:, length:]
    if shuffled:
        later = [np.take_along_axis(block, rng.permuted(np.tile(np.arange(length), (count, 1)), axis=1), axis=1)
                 for _ in range(copies - 1)]  # fmt: skip
    else:
        later = [block] * (copies - 1)
    head = np.full((count, 0 if bos is None else 1), bos or 0)
    rows = [
        np.concatenate([head[n], filler[n, gap:], block[n], filler[n, :gap], *(copy[n] for copy in later)])
        for n, gap in enumerate(between)
    ]
    first = head.shape[1] + max_gap - between[:, None] + np.arange(length * (copies - 1))
    tokens, match = torch.from_numpy(np.stack(rows)).long(), torch.from_numpy(first)
    return Repeats(tokens, match + length + torch.from_numpy(between[:, None]), match)


def layouts(length, room, n_ids):
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


def chance(repeats):
    """The induction score of uniform attention: the mean over queries i of 1/(i+1)."""
    return (1.0 / (repeats.query.double() + 1)).mean().item()


def repeat_losses(model, hidden, repeats):
    """Losses (B, Q-1) of the tokens that the repetition makes predictable, given ln_f's output hidden (B, T, C)."""
    rows = torch.arange(len(repeats), device=hidden.device)[:, None]
    query = repeats.query[:, :-1]  # the last token has no successor in the sequence
    targets = repeats.tokens[rows, query + 1]
    return token_losses(model, hidden[rows, query].flatten(0, 1), targets.flatten()).view(targets.shape)


def in_context_score(losses, early=50, late=500):
    """
    Loss at the late token minus loss at the early one, (N,); negative: context helps (arXiv:2209.11895).

    losses (N, T-1): of predicting tokens 2 to T, counted from 1 like `early` and `late` (forward.text_losses).
    """
    return losses[:, late - 2] - losses[:, early - 2]


def in_context_positions(targets):
    """
    Early and late token of the in-context score for targets (N, T), counted from 1; None if the windows are too short.

    50 and 500, or T/10 and T in shorter windows. The early one comes after all masked targets (-1): tokens that were
    never trained on have meaningless losses.
    """
    T = targets.size(1)
    early, late = (50, 500) if T >= 500 else (max(2, T // 10), T)
    masked = (targets == -1).any(0).nonzero().flatten()
    if len(masked):
        early = max(early, int(masked[-1]) + 3)  # the target of column i is token i + 2, counted from 1
    return (early, late) if early < late else None


# ---- scores ----------------------------------------------------------------------------------------------------------


def pattern_scores(pattern, repeats):
    """
    The scores of one layer's heads, from its patterns (B, H, T, T) on repeats: a dict of tensors (B, H).

    With A a pattern and i a query in a later copy:
      induction        mean_i A[i, match(i) + 1]: attention to the token after the counterpart one copy earlier
      prefix_matching  mean_i sum of A[i, j + 1] over all earlier j with the same token (arXiv:2209.11895)
      duplicate_token  mean_i A[i, match(i)]
      previous_token   mean over all i >= 1 of A[i, i - 1]
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
    }


def natural_scores(pattern, tokens):
    """
    The scores of one layer's heads on text (B, T), from their patterns (B, H, T, T): a dict of tensors (B, H).

    Over the positions i whose token occurred before in the window, with j all its earlier positions:
      induction        mean_i sum_j A[i, j + 1]
      duplicate_token  mean_i sum_j A[i, j]
      previous_token   mean over all i >= 1 of A[i, i - 1]
    The first two are NaN for a window without a token that occurs twice.
    """
    same = (tokens[:, :, None] == tokens[:, None]).tril(-1)  # (B, i, j)
    follows = F.pad(same, (1, -1))  # (B, i, j + 1)
    queries = same.any(-1).sum(-1, keepdim=True)  # other rows add nothing to the sums
    return {
        'induction': (pattern * follows[:, None]).sum((-1, -2)) / queries,
        'duplicate_token': (pattern * same[:, None]).sum((-1, -2)) / queries,
        'previous_token': pattern.diagonal(-1, 2, 3).mean(-1),
    }


def uniform_pattern(T):
    """Uniform attention over T tokens: (T, T)."""
    return torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]


@torch.no_grad()
def text_scores(model, tokens):
    """
    `natural_scores` of all heads on windows of text (N, T), and those of uniform attention: two dicts of arrays.

    The first has (N, L, H) under each name, the second (N,).
    """
    found, chances = [], []
    for window in tokens.split(1):
        on_device = window.to(device_of(model))
        found.append(score_layers(model, on_device, lambda _, a, t=on_device: natural_scores(a.pattern, t), False)[1])
        uniform = uniform_pattern(tokens.size(1))[None, None]
        chances.append({name: value[:, 0] for name, value in natural_scores(uniform, window).items()})
    return joined(found), joined(chances)


def score_layers(model, tokens, score, finish=True):
    """
    One forward pass over token ids (B, T): (hidden (B, T, C), {name: (B, L, H)}); hidden is None with finish=False.

    score(layer, Attention) -> dict of tensors (B, H). A layer's pattern is freed as soon as it is scored.
    """
    layers, x = [], embed(model, tokens)
    hidden = run(model, x, visit=lambda layer, a: layers.append(score(layer, a)), finish=finish)
    return hidden, {name: torch.stack([layer[name] for layer in layers], dim=1).cpu() for name in layers[0]}


def joined(parts):
    """Concatenates a list of dicts of tensors, one per batch, into one dict of float32 arrays."""
    return {name: torch.cat([part[name] for part in parts]).float().numpy() for name in parts[0]}


@torch.no_grad()
def head_scores(model, repeats, batch_size=16, losses=True):
    """
    Every head's scores on every sequence: a dict with a float32 array (N, L, H) for each of SCORES.

    With losses=True also 'losses' (N, T-1), of predicting each token but the first, and 'repeat_loss' (N,), the mean
    over the tokens that the repetition makes predictable.
    """
    found = []
    for part in repeats.batches(batch_size, device_of(model)):
        hidden, scores = score_layers(
            model, part.tokens, lambda layer, a, part=part: pattern_scores(a.pattern, part), finish=losses
        )
        if losses:
            targets = part.tokens[:, 1:]
            loss = token_losses(model, hidden[:, :-1].flatten(0, 1), targets.flatten()).view(targets.shape)
            scores.update(losses=loss.cpu(), repeat_loss=loss.gather(1, part.query[:, :-1]).mean(1).cpu())
        found.append(scores)
    return joined(found)


def ranked(scores):
    """Heads as a list of (layer, head) by descending score; scores (L, H)."""
    return [tuple(int(i) for i in np.unravel_index(n, scores.shape)) for n in np.argsort(-scores, axis=None)]


def verdict(low, random_null, shuffled_high, copying):
    """
    Which heads are induction heads: bool (L, H).

    low: lower bound of each head's induction score, on sequences that didn't select the head. random_null: the highest
    score of any head of randomly initialized models, a number. shuffled_high: upper bound of each head's score with a
    shuffled second copy. copying: its eigenvalue copying score. All but random_null are arrays (L, H).
    """
    return (low > random_null) & (low > shuffled_high) & (copying > 0)


def calls(measured):
    """
    Which heads are called what, by the name of a score: {name: bool (L, H)}. measured: of one model, as in `verdict`.

    An induction head is one by `verdict`. Of the other scores, the interval must lie above the highest score of any
    head of randomly initialized models; of copying, which has no interval, the score itself.
    """
    found = {'induction': measured['called']}
    for name in ('previous_token', 'duplicate_token'):
        found[name] = measured[name]['low'] > measured['nulls'][name]
    return found | {'copying': measured['copying_eigenvalues'] > measured['nulls']['copying']}


def is_untrained(model):
    """True if every norm gain is exactly 1 and every bias exactly 0: the initial values, which training changes."""
    vectors = [(name, p) for name, p in model.named_parameters() if p.dim() < 2]
    return all(bool((p == (0.0 if name.endswith('bias') else 1.0)).all()) for name, p in vectors)


# ---- ablations -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ablate_each_head(model, repeats, progress=None):
    """
    The loss on repeated tokens without ablation and with each head mean-ablated: arrays (N,) and (L, H, N).

    A head's output is replaced by its mean over sequences at each position: information about the position stays,
    information about tokens is removed. progress: called after each head.
    """
    repeats = repeats.to(device_of(model))
    x, rope = embed(model, repeats.tokens), rope_of(model, repeats.tokens.size(1))
    L, H = model.config.n_layer, model.config.n_head
    ablated = np.zeros((L, H, len(repeats)), dtype=np.float32)
    for layer, block in enumerate(model.transformer.h):
        z = fast_attention(*block.attn.qkv(block.ln_1(x), rope), block.attn.scale)
        for head in range(H):
            changed = z.clone()
            changed[:, head] = z[:, head].mean(0)
            hidden = run(model, finish_block(block, x, changed), start=layer + 1)
            ablated[layer, head] = repeat_losses(model, hidden, repeats).mean(1).cpu()
            if progress is not None:
                progress()
        x = finish_block(block, x, z)
    return repeat_losses(model, model.transformer.ln_f(x), repeats).mean(1).cpu().numpy(), ablated


@torch.no_grad()
def ablate_together(model, repeats, heads):
    """The loss on repeated tokens (N,) with all `heads`, pairs (layer, head), mean-ablated at once."""
    repeats, chosen = repeats.to(device_of(model)), {}
    for layer, head in heads:
        chosen.setdefault(layer, []).append(head)

    def edit(layer, z):
        if layer in chosen:
            z = z.clone()
            z[:, chosen[layer]] = z[:, chosen[layer]].mean(0)
        return z

    hidden = run(model, embed(model, repeats.tokens), edit=edit)
    return repeat_losses(model, hidden, repeats).mean(1).cpu().numpy()


def matched_heads(heads, n_head, rng):
    """Random heads outside `heads`, as many from each layer; fewer if a layer has too few others."""
    drawn = []
    for layer in sorted({layer for layer, _ in heads}):
        taken = {head for other, head in heads if other == layer}
        free = [head for head in range(n_head) if head not in taken]
        drawn += [(layer, int(head)) for head in rng.choice(free, min(len(free), len(taken)), replace=False)]
    return drawn


def ablate_cumulatively(model, repeats, ranking, counts, draws=4, seed=0):
    """
    The loss on repeated tokens with the first k heads of `ranking` ablated, for each k of `counts`, with controls.

    Returns a list of dicts: k, loss (N,), control (draws, N) with the same number of random heads of the same layers,
    and control_heads, their actual number: below k if a layer has too few others, which makes control a lower bound.
    A single head's ablation can be compensated by other heads with the same function, hence several at once.
    """
    rng, out = np.random.default_rng(seed), []
    for k in counts:
        heads = ranking[:k]
        controls = [matched_heads(heads, model.config.n_head, rng) for _ in range(draws)]
        out.append({
            'k': k,
            'loss': ablate_together(model, repeats, heads),
            'control': np.stack([ablate_together(model, repeats, control) for control in controls]),
            'control_heads': len(controls[0]),
        })  # fmt: skip
    return out


# ---- natural text ----------------------------------------------------------------------------------------------------


def bigram_losses(losses, tokens):
    """
    Losses (N, T-1) on tokens (N, T), where the bigram occurred earlier in the window and elsewhere: a dict of dicts.

    'repeated' and 'others' are mean losses, 'gain' is what repeating saves, others - repeated: each a dict of mean, low
    and high, the 95 % interval over windows. 'share' is the share of repeated positions. The gain isn't all induction:
    bigrams that repeat are common ones too. What it is before heads form is the measure of that.
    """
    again = repeated_pairs(tokens[:, :-1].numpy(), tokens[:, 1:].numpy())
    parts = [((losses * where).sum(1, dtype=float), where.sum(1)) for where in (again, ~again)]
    repeated, others = parts
    found = dict(repeated=stats.ratio(*repeated), others=stats.ratio(*others),
                 gain=stats.ratio_difference(*others, *repeated))  # fmt: skip
    around = {name: dict(mean=m, low=m - 1.96 * e, high=m + 1.96 * e) for name, (m, e) in found.items()}
    return around | dict(share=float(again.mean()))


@torch.no_grad()
def ablate_on_text(model, tokens, ranking, counts, draws=4, seed=0):
    """
    What the first k heads of `ranking` are worth on windows of text (N, T), for each k of `counts`: a list of dicts.

    Each has heads (k), 'repeated' and 'others' (rises of `bigram_losses` with these heads mean-ablated, dicts of mean,
    low and high over windows), 'control_repeated' and 'control_others' (the mean rise with the same number of random
    other heads of the same layers) and control_heads, their number, which is below k if a layer has too few others.
    """
    means, rng = head_means(model, tokens), np.random.default_rng(seed)
    base, out = text_losses(model, tokens), []

    def rise(heads):
        return bigram_losses(text_losses(model, tokens, edit=replacing_heads(means, heads)) - base, tokens)

    for k in counts:
        controls = [matched_heads(ranking[:k], model.config.n_head, rng) for _ in range(draws)]
        mine, theirs = rise(ranking[:k]), [rise(heads) for heads in controls]
        row = dict(heads=k, control_heads=len(controls[0]), **{name: mine[name] for name in ('repeated', 'others')})
        for name in ('repeated', 'others'):
            row[f'control_{name}'] = float(np.mean([found[name]['mean'] for found in theirs]))
        out.append(row)
    return out


# ---- self-test -------------------------------------------------------------------------------------------------------


def self_test(score=pattern_scores):
    """
    Scores patterns with known scores: perfect heads score 1, uniform attention scores chance. RuntimeError otherwise.

    Catches the known mistakes: a diagonal that is too long, a mean that includes rows without an earlier copy.
    score: the scoring function to test.
    """
    for layout in (dict(bos=None), dict(bos=99), dict(bos=99, max_gap=5), dict(bos=None, copies=4)):
        repeats = repeated_sequences(8, 12, np.arange(40), seed=1, **layout)
        N, T = repeats.tokens.shape
        sequence = torch.arange(N)[:, None]
        perfect = torch.zeros(N, 3, T, T)
        perfect[:, :, :, 0] = 1  # all other queries attend to the first token
        perfect[sequence, 0, repeats.query] = F.one_hot(repeats.match + 1, T).float()
        perfect[sequence, 1, repeats.query] = F.one_hot(repeats.match, T).float()
        perfect[:, 2, 1:] = torch.eye(T)[:-1]
        uniform = uniform_pattern(T)
        scores = score(perfect, repeats)
        flat = score(uniform.expand(N, 1, T, T), repeats)
        expected = [
            (scores['induction'][:, 0], 1.0, 'a perfect induction head'),
            (scores['duplicate_token'][:, 1], 1.0, 'a perfect duplicate-token head'),
            (scores['previous_token'][:, 2], 1.0, 'a perfect previous-token head'),
            (flat['induction'], chance(repeats), 'uniform attention'),
        ]
        for got, wanted, name in expected:
            if abs(got.mean().item() - wanted) > 1e-5:
                raise RuntimeError(f'self-test: {name} scored {got.mean().item():.4f} instead of {wanted:.4f}')
