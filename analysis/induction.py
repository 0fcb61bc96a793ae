"""
Induction heads, and what they are made of: measurements on a GPT or an MLAGPT. Tensors in, arrays out, no files.

An induction head (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022,
arXiv:2209.11895) continues a sequence that it has seen before: at a token it looks at what followed that token's
earlier occurrence, and copies it. It needs two layers: a previous-token head writes each token's predecessor into the
stream, the induction head matches the present token against that.

Notable features:
- one interface for both models: `attn.qkv`, `attn.head_weights` and the blocks themselves, walked in `run`
- one layer's patterns at a time, a few sequences at a time: memory does not grow with depth
- exact at the edges: a planted perfect head scores 1.000, uniform attention scores chance (`self_test`)
- every score comes per sequence, so that its interval can be taken over sequences (`bootstrap`)

Shapes: N sequences, B of them at a time, T tokens, Q queries scored in each, L layers, H heads, C width, d head size,
r latent, V vocabulary. Positions are 0-based. Losses are in nats. Models must be in eval mode.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from core.kernels import attend, attention_pattern

SCORES = ('induction', 'prefix_matching', 'duplicate_token', 'previous_token')


# ---- sequences that repeat -------------------------------------------------------------------------------------------


@dataclass
class Repeats:
    """Sequences with a repeated block, and which positions of theirs have an earlier counterpart."""

    tokens: torch.Tensor  # (N, T) int64
    query: torch.Tensor  # (N, Q) positions in the later copies
    match: torch.Tensor  # (N, Q) the position of the same place in the copy before

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        return Repeats(self.tokens[rows], self.query[rows], self.match[rows])

    def to(self, device):
        return Repeats(self.tokens.to(device), self.query.to(device), self.match.to(device))


def repeated_sequences(count, length, ids, *, bos=None, copies=2, max_gap=0, shuffled=False, seed=0):
    """
    `count` sequences [BOS] x x of `length` distinct random tokens x, as Repeats on the CPU.

    ids: token ids to draw from (no specials, no padding). bos: an id for position 0, or None. copies: how often x
    stands there. max_gap: so many further distinct tokens, a random share of them between the two copies and the rest
    before the first, so that neither distance nor position is the same in every sequence (two copies only).
    shuffled: the control. Later copies hold the same tokens, each in an order of its own; query and match stay as if
    they did not, so that what still scores there goes by position alone.
    Raises ValueError where there are too few ids, or a gap with more than two copies.
    """
    ids = np.asarray(ids)
    if length + max_gap > len(ids):
        raise ValueError(f'{length + max_gap} distinct tokens are needed, but there are {len(ids)} ids to draw from')
    if length < 2 or copies < 2 or (max_gap and copies > 2):
        raise ValueError('length and copies must be at least 2, and a gap can stand between two copies only')
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


def chance(repeats):
    """The induction score of uniform attention: the mean over queries i of 1/(i+1), not 1/T."""
    return (1.0 / (repeats.query.double() + 1)).mean().item()


# ---- running a model, layer by layer ---------------------------------------------------------------------------------


def embed(model, tokens):
    """The stream (B, T, C) that enters block 0, of token ids (B, T). ValueError in training mode or if too long."""
    if model.training:
        raise ValueError('measure a model in eval mode: call model.eval() first')
    T = tokens.size(1)
    if model.config.block_size < T:
        raise ValueError(f'{T} tokens do not fit: the model was made for block_size={model.config.block_size}')
    x = model.transformer.wte(tokens)
    return x + model.transformer.wpe.weight[:T] if model.config.pos == 'learned' else x


def rope_of(model, T):
    """RoPE's table for T positions, or None."""
    return None if model.rope is None else model.rope[:, :T]


@dataclass
class Attention:
    """What one layer computed: queries, keys and values (B, H, T, d), pattern (B, H, T, T), and from what (B, T, C)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pattern: torch.Tensor
    normed: torch.Tensor


@torch.no_grad()
def run(model, x, start=0, visit=None, edit=None, qkv=None, finish=True):
    """
    Carry the residual stream x (B, T, C) from block `start` through the last one; returns it after ln_f.

    finish=False: stops when the last pattern was seen, and returns None: the rest costs much, and patterns need it not.

    visit(layer, Attention): sees each layer; without it no pattern is made. edit(layer, z) -> z: may change the heads'
    outputs z (B, H, T, d). qkv(layer, attn, normed, rope): takes the place of attn.qkv(normed, rope).
    """
    rope = rope_of(model, x.size(1))
    for layer in range(start, model.config.n_layer):
        block = model.transformer.h[layer]
        attn, normed = block.attn, block.ln_1(x)
        q, k, v = attn.qkv(normed, rope) if qkv is None else qkv(layer, attn, normed, rope)
        if visit is None:
            z = attend(q, k, v, attn.scale)
        else:
            pattern = attention_pattern(q, k, attn.scale)
            visit(layer, Attention(q, k, v, pattern, normed))
            if not finish and layer == model.config.n_layer - 1:
                return None
            z = pattern @ v
        x = close_block(block, x, z if edit is None else edit(layer, z))
    return model.transformer.ln_f(x)


def close_block(block, x, z):
    """The rest of a block after its heads: x (B, T, C), heads' outputs z (B, H, T, d) -> the next block's input."""
    x = x + block.attn.c_proj(z.transpose(1, 2).flatten(2))
    return x + block.mlp(block.ln_2(x))


@torch.no_grad()
def patterns(model, tokens):
    """Every layer's attention pattern of a few sequences (B, T), for looking at: (L, B, H, T, T) on the CPU."""
    seen = []
    run(model, embed(model, tokens), visit=lambda layer, a: seen.append(a.pattern.cpu()), finish=False)
    return torch.stack(seen)


def batches(repeats, batch_size, device):
    """Repeats, `batch_size` sequences at a time, on the device."""
    for first in range(0, len(repeats), batch_size):
        yield repeats[first : first + batch_size].to(device)


def device_of(model):
    return model.lm_head.weight.device


@torch.no_grad()
def losses_of(model, hidden, targets, max_logits=2**24):
    """Cross-entropy (n,) of targets (n,) given hidden (n, C), without ever holding more than `max_logits` logits."""
    step = max(1, max_logits // model.config.vocab_size)
    parts = [
        F.cross_entropy(model.lm_head(hidden[first : first + step]), targets[first : first + step], reduction='none')
        for first in range(0, len(targets), step)
    ]
    return torch.cat(parts)


def repeat_losses(model, hidden, repeats):
    """Losses (B, Q-1) at the queries whose next token is a repeat too, given hidden (B, T, C)."""
    rows = torch.arange(len(repeats), device=hidden.device)[:, None]
    query = repeats.query[:, :-1]  # what follows the last token is not in the sequence
    targets = repeats.tokens[rows, query + 1]
    return losses_of(model, hidden[rows, query].flatten(0, 1), targets.flatten()).view(targets.shape)


def in_context_score(losses, early=50, late=500):
    """
    Loss at the late token minus loss at the early one, (N,) in nats; negative: context helps (arXiv:2209.11895).

    losses (N, T-1) are those of predicting tokens 2 to T, counted from 1 as `early` and `late` are.
    """
    return losses[:, late - 2] - losses[:, early - 2]


@torch.no_grad()
def text_losses(model, tokens, positions=None, batch_size=8):
    """Loss of predicting each token but the first, (N, T-1) array; with `positions` only those (counted from 1)."""
    index = torch.arange(tokens.size(1) - 1) if positions is None else torch.tensor(positions) - 2
    out = np.full((len(tokens), tokens.size(1) - 1), np.nan, dtype=np.float32)
    for first in range(0, len(tokens), batch_size):
        part = tokens[first : first + batch_size].to(device_of(model))
        hidden = run(model, embed(model, part))[:, index]
        targets = part[:, index + 1]
        losses = losses_of(model, hidden.flatten(0, 1), targets.flatten())
        out[first : first + len(part), index] = losses.view(targets.shape).cpu()
    return out


# ---- scores of patterns ----------------------------------------------------------------------------------------------


def pattern_scores(pattern, repeats):
    """
    Scores of one layer's heads, from patterns (B, H, T, T) over repeats: a dict of (B, H) tensors.

    With A a pattern and i a query in a later copy:
      induction        mean_i A[i, match(i) + 1]: on what followed the same place one copy earlier
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


def run_and_score(model, repeats, score, finish=True):
    """
    One forward pass over a few sequences: (hidden (B, T, C), or None if not to be finished; {name: (B, L, H)}).

    score(layer, Attention) returns a dict of (B, H) tensors; the layer's pattern is dropped as soon as it is scored.
    """
    layers, x = [], embed(model, repeats.tokens)
    hidden = run(model, x, visit=lambda layer, a: layers.append(score(layer, a)), finish=finish)
    return hidden, {name: torch.stack([layer[name] for layer in layers], dim=1).cpu() for name in layers[0]}


def joined(parts):
    """A list of dicts of tensors, one per batch, as one dict of float32 arrays."""
    return {name: torch.cat([part[name] for part in parts]).float().numpy() for name in parts[0]}


@torch.no_grad()
def head_scores(model, repeats, batch_size=16, losses=True):
    """
    Every head's scores on every sequence: a dict of float32 arrays (N, L, H), one for each of SCORES.

    With `losses` also 'losses' (N, T-1), the loss of predicting each token but the first, and 'repeat_loss' (N,), its
    mean over the tokens that a repeat makes predictable.
    """
    found = []
    for part in batches(repeats, batch_size, device_of(model)):
        hidden, scores = run_and_score(
            model, part, lambda layer, a, part=part: pattern_scores(a.pattern, part), finish=losses
        )
        if losses:
            targets = part.tokens[:, 1:]
            loss = losses_of(model, hidden[:, :-1].flatten(0, 1), targets.flatten()).view(targets.shape)
            scores.update(losses=loss.cpu(), repeat_loss=loss.gather(1, part.query[:, :-1]).mean(1).cpu())
        found.append(scores)
    return joined(found)


# ---- what heads copy, and how they compose: weights alone ------------------------------------------------------------


@torch.no_grad()
def circuits(attn):
    """W_QK and W_OV of every head, both (H, C, C), on the layer's normed input: scores x^T W_QK x, output W_OV x."""
    w_q, w_k, w_v, w_o = attn.head_weights()
    return w_q.transpose(1, 2) @ w_k, w_o @ w_v


def stream_weights(block):
    """head_weights as they act on the residual stream: ln_1's gain and its subtraction of the mean are folded in."""
    w_q, w_k, w_v, w_o = block.attn.head_weights()
    folded = [w * block.ln_1.weight for w in (w_q, w_k, w_v)]
    return (*(w - w.mean(-1, keepdim=True) for w in folded), w_o)


@torch.no_grad()
def effective_embeddings(model, ids, batch_size=1024):
    """
    Token embeddings (n, C) as later layers find them: E + MLP_0(E), block 0's attention and positions left out.

    GPT-2's MLP 0 rewrites the embedding; raw E makes heads that copy look as if they did not.
    """
    block, parts = model.transformer.h[0], []
    for chunk in torch.as_tensor(ids, device=device_of(model)).split(batch_size):
        x = model.transformer.wte(chunk)
        parts.append(x + block.mlp(block.ln_2(x)))
    return torch.cat(parts)


@torch.no_grad()
def copying_eigenvalues(model, ids, effective=True):
    """
    Re(sum lambda) / sum |lambda| over the eigenvalues of W_U W_OV W_E, (L, H) in -1 to 1: 1 is pure copying.

    Elhage et al. 2021. ids: real token ids (n,). The V x V product's nonzero eigenvalues are those of the d x d product
    W_V W_E W_U W_O. Norms: embeddings are normed as ln_1 does, the gains of ln_1 and ln_f are folded in.
    """
    ids, gain = torch.as_tensor(ids, device=device_of(model)), model.transformer.ln_f.weight
    C = model.config.n_embd
    middle = torch.zeros(C, C, device=gain.device, dtype=gain.dtype)
    for chunk in ids.split(1024):
        embedding = effective_embeddings(model, chunk) if effective else model.transformer.wte(chunk)
        unembedding = model.lm_head.weight[chunk] * gain
        middle += F.layer_norm(embedding, (C,)).T @ (unembedding - unembedding.mean(-1, keepdim=True))
    scores = []
    for block in model.transformer.h:
        _, _, w_v, w_o = stream_weights(block)
        values = torch.linalg.eigvals((w_v @ middle @ w_o).double())
        scores.append(values.real.sum(-1) / values.abs().sum(-1).clamp_min(1e-30))
    return torch.stack(scores).cpu().numpy()


@torch.no_grad()
def copying_tokens(model, ids, top=5, max_logits=2**24):
    """
    Share of tokens `ids` that a head, attending to one, puts among its own `top` logits: (L, H) in 0 to 1.

    Wang et al. 2022 (arXiv:2211.00593), section 3.3: the effective embedding through ln_1, OV, ln_f and unembedding.
    """
    ids = torch.as_tensor(ids, device=device_of(model))
    embedding, rope = effective_embeddings(model, ids), rope_of(model, 1)
    n_head, step = model.config.n_head, max(1, max_logits // model.config.vocab_size)
    own_id, shares = ids.repeat_interleave(n_head), []
    for block in model.transformer.h:
        _, _, v = block.attn.qkv(block.ln_1(embedding)[:, None], rope)  # one-token sequences: (n, H, 1, d)
        out = torch.einsum('nhd,hcd->nhc', v[:, :, 0], block.attn.head_weights()[3]).flatten(0, 1)
        hits = []
        for rows, own in zip(model.transformer.ln_f(out).split(step), own_id.split(step), strict=True):
            logits = model.lm_head(rows)
            hits.append((logits >= logits.gather(1, own[:, None])).sum(1) <= top)  # itself among them; a tie is no hit
        shares.append(torch.cat(hits).view(-1, n_head).float().mean(0))
    return torch.stack(shares).cpu().numpy()


def frobenius(middle, left, right):
    """Squared norms ||A^T M B||^2 from M (..., a, b) and the Gram matrices left = A A^T, right = B B^T."""
    return ((left @ middle @ right) * middle).sum((-2, -1))


@torch.no_grad()
def composition(model):
    """
    How much each later head reads of what each earlier one writes: {'q', 'k', 'v'} -> lift, array (L, H, L, H).

    [l1, h1, l2, h2] with l1 < l2, nan elsewhere. Elhage et al. 2021 score, in row-vector convention,
      k: |W_OV1 W_QK2^T| / (|W_OV1| |W_QK2|)   q: |W_OV1 W_QK2| / (..)   v: |W_OV1 W_OV2| / (|W_OV1| |W_OV2|)
    in Frobenius norms. Lift is C score^2: its expectation is 1 when a random rotation stands between the two, whatever
    their ranks, so that it compares MHA and MLA fairly. All norms come from d x d Gram matrices.
    """
    L, H, C = model.config.n_layer, model.config.n_head, model.config.n_embd
    lift = {kind: np.full((L, H, L, H), np.nan, dtype=np.float32) for kind in 'qkv'}
    layers = []
    for block in model.transformer.h:
        q, k, v, o = stream_weights(block)
        grams = dict(q=q @ q.mT, k=k @ k.mT, v=v @ v.mT, o=o.mT @ o)
        layers.append((dict(q=q, k=k, v=v, o=o), grams))
    for second in range(1, L):
        weights, grams = layers[second]
        qk, ov = (grams['q'] * grams['k']).sum((-2, -1)), (grams['v'] * grams['o']).sum((-2, -1))
        for first in range(second):
            earlier, earlier_grams = layers[first]
            ov1 = (earlier_grams['v'] * earlier_grams['o']).sum((-2, -1))
            for kind, other, norm in (('q', 'k', qk), ('k', 'q', qk), ('v', 'o', ov)):
                # (W_2 W_O1)^T of all pairs in one product: (H2 d2, C) (C, H1 d1) -> (H1, H2, d1, d2)
                product = weights[kind].flatten(0, 1) @ earlier['o'].transpose(0, 1).flatten(1)
                middle = product.view(H, -1, H, product.size(1) // H).permute(2, 0, 3, 1)
                squared = frobenius(middle, earlier_grams['v'][:, None], grams[other][None])
                lift[kind][first, :, second] = (C * squared / (ov1[:, None] * norm[None]).clamp_min(1e-30)).cpu()
    return lift


# ---- ablations -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ablate_each_head(model, repeats, progress=None):
    """
    The loss on repeated tokens with each head set to its mean: (base (N,), ablated (L, H, N)), arrays.

    A head's mean is taken over the sequences at each position, so that what it says about position stays and what it
    says about tokens goes. progress: called after each head.
    """
    repeats = repeats.to(device_of(model))
    x, rope = embed(model, repeats.tokens), rope_of(model, repeats.tokens.size(1))
    L, H = model.config.n_layer, model.config.n_head
    ablated = np.zeros((L, H, len(repeats)), dtype=np.float32)
    for layer, block in enumerate(model.transformer.h):
        z = attend(*block.attn.qkv(block.ln_1(x), rope), block.attn.scale)
        for head in range(H):
            changed = z.clone()
            changed[:, head] = z[:, head].mean(0)
            hidden = run(model, close_block(block, x, changed), start=layer + 1)
            ablated[layer, head] = repeat_losses(model, hidden, repeats).mean(1).cpu()
            if progress is not None:
                progress()
        x = close_block(block, x, z)
    return repeat_losses(model, model.transformer.ln_f(x), repeats).mean(1).cpu().numpy(), ablated


@torch.no_grad()
def ablate_together(model, repeats, heads):
    """The loss on repeated tokens (N,) with all `heads`, pairs (layer, head), set to their means at once."""
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
    """As many random heads from the same layers, none of them in `heads`; fewer where a layer has no others left."""
    drawn = []
    for layer in sorted({layer for layer, _ in heads}):
        taken = {head for other, head in heads if other == layer}
        free = [head for head in range(n_head) if head not in taken]
        drawn += [(layer, int(head)) for head in rng.choice(free, min(len(free), len(taken)), replace=False)]
    return drawn


def ablate_cumulatively(model, repeats, ranking, counts, draws=4, seed=0):
    """
    The loss on repeated tokens with the first k of `ranking` ablated, for each k of `counts`, against random heads.

    Returns a list of dicts: k, loss (N,), control (draws, N) with as many random heads of the same layers, and
    control_heads, how many those were (fewer than k where a layer had no others left; control is then a lower bound).
    A single head hides behind its spares, which is why heads are taken away together.
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


# ---- what only MLA has: the latent -----------------------------------------------------------------------------------


def content_latent(attn, normed, rope):
    """The latent c_kv (B, T, r) without the position key behind it."""
    return attn.latent(normed, rope)[..., : attn.n_latent]


@torch.no_grad()
def latent_moments(model, repeats, batch_size=16):
    """Mean (r,) and covariance (r, r) of each layer's latent over all tokens, float64: a list of L pairs."""
    L, r = model.config.n_layer, model.config.n_latent
    total = torch.zeros(L, r, dtype=torch.float64)
    squares = torch.zeros(L, r, r, dtype=torch.float64)
    rope = rope_of(model, repeats.tokens.size(1))

    def add(layer, attention):
        latent = content_latent(model.transformer.h[layer].attn, attention.normed, rope).flatten(0, 1).double()
        total[layer] += latent.sum(0).cpu()
        squares[layer] += (latent.T @ latent).cpu()

    for part in batches(repeats, batch_size, device_of(model)):
        run(model, embed(model, part.tokens), visit=add, finish=False)
    mean = total / repeats.tokens.numel()
    return [(m, s / repeats.tokens.numel() - m[:, None] * m) for m, s in zip(mean, squares, strict=True)]


def effective_rank(covariance):
    """exp of the entropy of the covariance's eigenvalues as shares (Roy & Vetterli 2007): 1 to r."""
    share = torch.linalg.eigvalsh(covariance).clamp_min(0)
    share = share / share.sum().clamp_min(1e-300)
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


def row_space(weights):
    """Orthonormal bases (H, min(a, r), r) of the row spaces of weights (H, a, r), float64."""
    return torch.linalg.qr(weights.double().mT)[0].mT


def overlap(first, second):
    """
    |Q1^T Q2|^2 / min(rank) between each row space of first (G, a, r) and each of second (H, b, r): (G, H) in 0 to 1.

    1 is containment. Two random subspaces of the r-dimensional latent overlap by max(a, b) / r: d/r, not d/C.
    """
    bases = [row_space(weights) for weights in (first, second)]
    product = bases[0].flatten(0, 1) @ bases[1].flatten(0, 1).T
    (G, a, _), (H, b, _) = (basis.shape for basis in bases)
    return product.view(G, a, H, b).square().sum((1, 3)) / min(a, b)


@torch.no_grad()
def reading_overlaps(attn):
    """
    How far heads read the same directions of the latent: arrays (H, H) and the value that chance gives.

    {'key': (array, chance), 'value': .., 'key_value': ..}; key_value[g, h] compares head g's keys with head h's values.
    """
    w_k, w_v, _ = attn.up_weights()
    pairs = {'key': (w_k, w_k), 'value': (w_v, w_v), 'key_value': (w_k, w_v)}
    return {
        name: (overlap(a, b).cpu().numpy(), min(1.0, max(a.size(1), b.size(1)) / attn.n_latent))
        for name, (a, b) in pairs.items()
    }


def latent_bands(r, bands):
    """Ranges of the r principal components, the largest first: `bands` of them, as equal as can be, r at most."""
    edges = np.linspace(0, r, min(r, bands) + 1).round().astype(int)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def without_directions(layer, basis, mean, path):
    """A `qkv` for `run`: in `layer`, the latent's coordinates along basis (r, n) are set to their mean in one path."""

    def qkv(this_layer, attn, normed, rope):
        if this_layer != layer:
            return attn.qkv(normed, rope)
        latent = attn.latent(normed, rope)
        changed = latent.clone()
        content = changed[..., : attn.n_latent]
        content -= (content - mean) @ basis @ basis.T
        k, _ = attn.decompress(changed if path == 'keys' else latent)
        _, v = attn.decompress(changed if path == 'values' else latent)
        return attn.queries(normed, rope), k, v

    return qkv


@torch.no_grad()
def ablate_latent(model, repeats, moments=None, bands=16, progress=None):
    """
    The loss on repeated tokens with some of a layer's latent directions held at their mean, for keys or values only.

    Directions are principal components of the latent, in bands from the largest. Returns a dict: bands (a list of
    ranges), base (N,), keys and values (L, bands, N).
    """
    repeats = repeats.to(device_of(model))
    moments = moments or latent_moments(model, repeats)
    ranges, x = latent_bands(model.config.n_latent, bands), embed(model, repeats.tokens)
    shape = (model.config.n_layer, len(ranges), len(repeats))
    out = {'keys': np.zeros(shape, np.float32), 'values': np.zeros(shape, np.float32)}
    for layer, (mean, covariance) in enumerate(moments):
        components = torch.linalg.eigh(covariance)[1].flip(-1).to(x)
        for path, band in [(path, band) for path in out for band in range(len(ranges))]:
            first, last = ranges[band]
            changed = without_directions(layer, components[:, first:last], mean.to(x), path)
            hidden = run(model, x, qkv=changed)
            out[path][layer, band] = repeat_losses(model, hidden, repeats).mean(1).cpu()
            if progress is not None:
                progress()
    return dict(out, bands=ranges, base=repeat_losses(model, run(model, x), repeats).mean(1).cpu().numpy())


@torch.no_grad()
def logit_parts(model, repeats, batch_size=16):
    """
    Where the induction logit comes from with decoupled RoPE: {'content', 'position'} -> (N, L, H) arrays.

    Each is that part of the scaled logit at the induction target, above its mean over the keys the query sees.
    """
    n_nope = model.config.head_size - model.config.n_rope

    def split_logits(layer, a, part):
        sequence = torch.arange(len(part), device=part.tokens.device)[:, None]
        visible = (torch.arange(part.tokens.size(1), device=part.tokens.device) <= part.query[..., None])[:, :, None]
        target, parts = (part.match + 1)[:, :, None, None].expand(-1, -1, a.q.size(1), 1), {}
        for name, cut in (('content', slice(None, n_nope)), ('position', slice(n_nope, None))):
            logits = (a.q[..., cut] @ a.k[..., cut].mT * model.transformer.h[layer].attn.scale)[sequence, :, part.query]
            mean = (logits * visible).sum(-1) / visible.sum(-1)  # (B, Q, H)
            parts[name] = (logits.gather(-1, target).squeeze(-1) - mean).mean(1)
        return parts

    return joined([
        run_and_score(model, part, lambda layer, a, part=part: split_logits(layer, a, part), finish=False)[1]
        for part in batches(repeats, batch_size, device_of(model))
    ])  # fmt: skip


# ---- what can be said ------------------------------------------------------------------------------------------------


def bootstrap(values, resamples=2000, seed=0, level=0.95):
    """Interval of the mean over the first axis of `values` (N, ...), by resampling sequences: (low, high) arrays."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    means = (counts @ values.reshape(n, -1) / n).reshape(resamples, *values.shape[1:])
    tail = (1 - level) / 2
    return np.quantile(means, tail, axis=0), np.quantile(means, 1 - tail, axis=0)


def verdict(low, random_null, shuffled_high, copying):
    """
    Which heads are induction heads: bool (L, H).

    low: lower end of the induction score's interval, on sequences that did not choose the head. random_null: the
    highest score of any head of randomly initialised models (a number). shuffled_high: upper end of the head's own
    interval where the second copy is shuffled. copying: its eigenvalue copying score. All but random_null are (L, H).
    """
    return (low > random_null) & (low > shuffled_high) & (copying > 0)


def is_untrained(model):
    """Whether every norm gain is still exactly 1 and every bias exactly 0, as no training step leaves them."""
    vectors = [(name, p) for name, p in model.named_parameters() if p.dim() < 2]
    return all(bool((p == (0.0 if name.endswith('bias') else 1.0)).all()) for name, p in vectors)


def self_test():
    """
    Score patterns whose scores are known: perfect heads score 1, uniform attention chance. RuntimeError if they don't.

    The known slips (a diagonal too long, a mean over rows that have no earlier copy) all fail here.
    """
    for layout in (dict(bos=None), dict(bos=99), dict(bos=99, max_gap=5), dict(bos=None, copies=4)):
        repeats = repeated_sequences(8, 12, np.arange(40), seed=1, **layout)
        N, T = repeats.tokens.shape
        sequence = torch.arange(N)[:, None]
        perfect = torch.zeros(N, 3, T, T)
        perfect[:, :, :, 0] = 1  # elsewhere at rest, on the first token
        perfect[sequence, 0, repeats.query] = F.one_hot(repeats.match + 1, T).float()
        perfect[sequence, 1, repeats.query] = F.one_hot(repeats.match, T).float()
        perfect[:, 2, 1:] = torch.eye(T)[:-1]
        uniform = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
        scores = pattern_scores(perfect, repeats)
        flat = pattern_scores(uniform.expand(N, 1, T, T), repeats)
        expected = [
            (scores['induction'][:, 0], 1.0, 'a perfect induction head'),
            (scores['duplicate_token'][:, 1], 1.0, 'a perfect duplicate-token head'),
            (scores['previous_token'][:, 2], 1.0, 'a perfect previous-token head'),
            (flat['induction'], chance(repeats), 'uniform attention'),
        ]
        for got, wanted, name in expected:
            if abs(got.mean().item() - wanted) > 1e-5:
                raise RuntimeError(f'self-test: {name} scored {got.mean().item():.4f} instead of {wanted:.4f}')
