"""
Attention of one decode step in latent space, in one pass over the latents: a kernel in Triton, for a GPU.

Two matrix products, q l^T and p l, read the cached latents twice. Here a piece of them is loaded once for both. For a
head with query q and latents l_j = (c_j, k_j) of r + R numbers, where k_j is the shared position key,

    s_j = scale q . (c_j, k_j)          out = sum_j softmax(s)_j c_j

A single sequence must keep all multiprocessors busy, so it is split into pieces P (flash-decoding, Dao et al. 2023),
and the softmax is computed as it comes (Milakov and Gimelshein 2018, arXiv:1805.02867). A piece gives

    m_P = max s_j      z_P = sum exp(s_j - m_P)      o_P = sum exp(s_j - m_P) c_j           j in P
    out = sum_P exp(m_P - m) o_P / sum_P exp(m_P - m) z_P                                   m = max m_P

Grouped-query attention is the same with K latents and R = 0, and its values in a tensor of their own. Latents in int8
are multiplied by one number per token: it scales s_j, and exp(s_j - m_P) in o_P.

Nothing chooses this kernel: studies/latent_kernel.py measures it against the two products. It needs Triton, which
PyTorch's CUDA builds contain; tests/ops/test_latent_attention.py runs it on a CPU in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl

TOKENS = 32  # of a tile: with 512 numbers each in bfloat16 it takes 32 KiB of a multiprocessor's memory
HEADS = 16  # of a program: the least that the matrix units multiply at once


@triton.jit
def _attend_piece(
    query, latents, values, factors, length, out, largest, total, scale, S, tokens,
    G: tl.constexpr, H: tl.constexpr, r: tl.constexpr, R: tl.constexpr, in_int8: tl.constexpr, apart: tl.constexpr,
    r_block: tl.constexpr, R_block: tl.constexpr, n_head: tl.constexpr, n_token: tl.constexpr,
):  # fmt: skip
    """o_P, m_P and z_P of `n_head` of a group's H heads over one piece of `tokens` tokens."""
    group, piece, pieces = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    head = tl.program_id(1) * n_head + tl.arange(0, n_head)[:, None]
    i, j, one = tl.arange(0, r_block)[None], tl.arange(0, R_block)[None], tl.arange(0, n_token)
    row = (group * H + head) * (r + R)
    q_c = tl.load(query + row + i, (head < H) & (i < r), 0.0)
    q_k = tl.load(query + row + r + j, (head < H) & (j < R), 0.0)
    m = tl.full((n_head,), float('-inf'), tl.float32)
    z = tl.zeros((n_head,), tl.float32)
    o = tl.zeros((n_head, r_block), tl.float32)
    end = tl.minimum((piece + 1) * tokens, tl.load(length).to(tl.int32))
    for start in range(piece * tokens, end, n_token):
        token = start + one
        at, seen = (group * S + token)[:, None], token < end
        c = tl.load(latents + at * (r + R) + i, seen[:, None] & (i < r), 0).to(q_c.dtype)
        s = tl.dot(q_c, tl.trans(c), input_precision='ieee')
        if R:
            k = tl.load(latents + at * (r + R) + r + j, seen[:, None] & (j < R), 0).to(q_c.dtype)
            s += tl.dot(q_k, tl.trans(k), input_precision='ieee')
        if apart:
            c = tl.load(values + at * r + i, seen[:, None] & (i < r), 0).to(q_c.dtype)
        factor = tl.load(factors + group * S + token, seen, 0.0) if in_int8 else 1.0
        s = tl.where(seen[None], s * scale * factor, float('-inf'))
        m_new = tl.maximum(m, tl.max(s, 1))
        p, shrunk = tl.exp(s - m_new[:, None]), tl.exp(m - m_new)
        z = z * shrunk + tl.sum(p, 1)
        o = o * shrunk[:, None] + tl.dot((p * factor).to(c.dtype), c, input_precision='ieee')
        m = m_new
    place = (group * H + head) * pieces + piece
    tl.store(out + place * r + i, o, (head < H) & (i < r))
    tl.store(largest + place, m[:, None], head < H)
    tl.store(total + place, z[:, None], head < H)


def pieces_for(programs: int, S: int, device: torch.device) -> int:
    """Into how many pieces S tokens are split, so that a GPU has two programs for each of its multiprocessors."""
    busy = torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1
    return max(1, min(-(-2 * busy // programs), -(-S // (4 * TOKENS))))


def attend_latents(
    q: torch.Tensor,
    latents: torch.Tensor,
    rank: int,
    scale: float,
    length: torch.Tensor,
    values: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    pieces: int = 0,
) -> torch.Tensor:
    """
    One query per head over cached latents: q (B, H, r + R), latents (B, K, S, r + R) -> (B, H, r), in the dtype of q.

    Each of K groups serves H/K neighboring heads; MLA has one. rank: r. length: int (1,), how many of the S tokens are
    filled, at least 1; a tensor, so that a CUDA graph can replay the step. values (B, K, S, r): of GQA, whose keys then
    are the latents. factors (B, K, S): of latents in int8. pieces: of each sequence; 0: enough for the GPU. There is no
    gradient. ValueError where the shapes don't fit.
    """
    (B, H, size), (_, K, S, _) = q.shape, latents.shape
    if H % K or latents.shape != (B, K, S, size) or not 0 < rank <= size:
        raise ValueError(f'q {(*q.shape,)}, latents {(*latents.shape,)} and rank {rank} do not belong together')
    if values is not None and (rank < size or values.shape != latents.shape):
        raise ValueError(f'values {(*values.shape,)} must have the shape of the keys {(*latents.shape,)}, without R')
    if (latents.dtype == torch.int8) != (factors is not None):
        raise ValueError('latents in int8 need their factors, and no others have any')
    in_group, heads = H // K, triton.cdiv(H // K, HEADS)
    pieces = min(pieces or pieces_for(B * K * heads, S, q.device), S)
    tokens = triton.cdiv(triton.cdiv(S, pieces), TOKENS) * TOKENS
    pieces = triton.cdiv(S, tokens)
    q, latents = q.contiguous(), latents.contiguous()
    values = latents if values is None else values.contiguous()
    out = q.new_empty(B, H, pieces, rank, dtype=torch.float32)
    largest, total = (q.new_empty(B, H, pieces, 1, dtype=torch.float32) for _ in range(2))
    _attend_piece[(B * K, heads, pieces)](
        q, latents, values, latents if factors is None else factors.contiguous(), length, out, largest, total,
        scale, S, tokens, K, in_group, rank, size - rank, factors is not None, values is not latents,
        max(16, triton.next_power_of_2(rank)), max(16, triton.next_power_of_2(size - rank)), HEADS, TOKENS,
    )  # fmt: skip
    weight = (largest - largest.amax(2, keepdim=True)).exp()  # 0 for a piece that has no token yet
    return ((weight * out).sum(2) / (weight * total).sum(2)).to(q.dtype)
