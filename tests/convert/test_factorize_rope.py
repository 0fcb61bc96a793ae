"""MHA and GQA with RoPE as MLA: exact where it must be, and closer with text than without it."""

import inspect

import pytest
import torch
from support.models import assert_close
from test_factorize import batches, logits, trained_like

from core.convert.factorize import collect_statistics, to_mla
from core.convert.factorize_rope import (
    RotatedLayer,
    Scores,
    as_complex,
    as_real,
    collect_inputs,
    to_published_mla,
)
from core.text.tokenizer import CharTokenizer
from model import GPT, GPTConfig, rope_table
from model_mla import MLAGPT
from ops import kernels
from ops.kernels import repeat_heads

C, d = 32, 8
SHAPES = {
    'mha': dict(bias=True),
    'mha-rms': dict(bias=False, norm='rms'),
    'gqa': dict(bias=True, n_kv_head=2),
    'gqa-modern': dict(bias=False, n_kv_head=2, norm='rms', mlp='swiglu', tied=False, rope_theta=500.0),
    'mqa': dict(bias=True, n_kv_head=1),
    'mqa-rms': dict(bias=False, n_kv_head=1, norm='rms'),
}


def rotated(shape, **changes):
    return trained_like(**{'n_embd': C, 'pos': 'rope', **SHAPES[shape], **changes})


# ---- keys that are decompressed and rotated whole --------------------------------------------------------------------


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('text', [None, [torch.arange(8)[None]], batches()], ids=['weights', '8 tokens', '512 tokens'])
@pytest.mark.parametrize('balance', [True, False])
def test_the_rank_of_keys_and_values_is_exact(shape, text, balance):
    """On text that the statistics were not made from, with the cache of the original for GQA and half of it for MHA."""
    model = rotated(shape)
    statistics = collect_statistics(model, text) if text else None
    rank = min(2 * model.config.kv_heads * d, C)
    mla = to_mla(model, rank, statistics, balance)
    assert type(mla) is MLAGPT and not mla.config.shared_rope
    assert mla.init_cache(1).bytes_per_token == 2 * rank * 8  # two layers, float64
    tolerance = 1e-12 if text is None or len(text) > 1 else 1e-10  # most directions were hardly seen in 8 tokens
    for idx in batches(2, seed=7):
        assert (logits(mla, idx) - logits(model, idx)).abs().max() < tolerance * logits(model, idx).abs().max()
    fewer = to_mla(model, rank - 2, statistics, balance)
    assert (logits(fewer, idx) - logits(model, idx)).abs().max() > 1e-5


@pytest.mark.parametrize('text', [True, False])
@pytest.mark.parametrize('changes', [dict(pos='none'), dict(norm='rms', bias=False), dict(norm='rms')], ids=str)
def test_other_shapes_without_rotations_are_exact_at_full_rank(changes, text):
    model = trained_like(n_embd=C, **changes)
    mla = to_mla(model, C, collect_statistics(model, batches()) if text else None)
    assert mla.config.shared_rope and mla.config.pos == model.config.pos
    assert_close(logits(mla, batches()[0]), logits(model, batches()[0]))


def published(model, n_latent=0, n_rope=0, text=None):
    """The published shape, from statistics and scores on some text."""
    text = batches() if text is None else text
    return to_published_mla(model, collect_statistics(model, text), collect_inputs(model, text), n_latent, n_rope)


def turned(model, turn, n_latent, n_rope, text=None):
    """The same with a given mean turn (d/2,) for all layers, or a function of it, and no factors fitted to text."""
    found = Scores.mean_turn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scores, 'mean_turn', (lambda scores: turn(found(scores))) if callable(turn) else lambda _: turn)
        patch.setattr(RotatedLayer, 'fitted', lambda layer, kept, scores: layer.plain(kept))
        return published(model, n_latent, n_rope, text)


def test_gqa_keeps_the_size_of_its_cache_by_default_and_mha_half_of_n_embd():
    for shape, size in (('gqa', C), ('mqa', 2 * d), ('mha', C // 2)):
        assert to_mla(rotated(shape)).config.n_latent == size


def test_a_converted_model_decodes_with_its_cache_as_without():
    for convert in (lambda m: to_mla(m, 12, collect_statistics(m, batches())), lambda m: published(m, 12)):
        model, idx = rotated('gqa'), batches(1)[0]
        mla = convert(model)
        cache = mla.init_cache(len(idx))
        with torch.no_grad():
            steps = [mla(idx[:, i : i + 1], cache=cache)[0] for i in range(idx.size(1))]
        assert_close(torch.cat(steps, dim=1), logits(mla, idx))


# ---- one rotated key for all heads beside content keys ---------------------------------------------------------------


@pytest.mark.parametrize('shape', ['mqa', 'mqa-rms'])
def test_mqa_is_the_published_shape_exactly(shape):
    """Its one key becomes the shared one, whole; the latent holds nothing but its d values."""
    model = rotated(shape)
    mla = published(model, d, d)
    assert mla.init_cache(1).bytes_per_token == model.init_cache(1).bytes_per_token
    for idx in batches(2, seed=7):
        assert (logits(mla, idx) - logits(model, idx)).abs().max() < 1e-10 * logits(model, idx).abs().max()


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('n_rope', [d, d // 2, 2])
def test_scores_are_exact_at_the_distance_that_content_keys_are_turned_for(shape, n_rope):
    """What stays rotated is right at any distance, and the rest at this one; the latent loses nothing at n_embd."""
    model, distance, idx = rotated(shape), 3, batches(1, seed=7)[0]
    turn = torch.complex(*rope_table(d, 16, model.config.rope_theta).double()[:, distance])
    mla = turned(model, turn, C, n_rope)
    with torch.no_grad():
        x = model.transformer.h[0].ln_1(model.transformer.wte(idx))
        scores = []
        for attention, rope in ((model.transformer.h[0].attn, model.rope), (mla.transformer.h[0].attn, mla.rope)):
            q, k, _ = attention.qkv(x, rope)
            pairs = attention.scale * q @ repeat_heads(k, 4).mT
            scores.append(pairs)
    exact, approximate = (s.diagonal(-distance, dim1=-2, dim2=-1) for s in scores)
    assert (approximate - exact).abs().max() < 1e-6 * exact.abs().max()  # angles are float32
    if model.config.kv_heads > 1:
        exact, approximate = (s.diagonal(-distance - 2, dim1=-2, dim2=-1) for s in scores)
        assert (approximate - exact).abs().max() > 1e-3 * exact.abs().max()


def test_frequencies_that_stay_are_those_that_matter():
    """Keys and queries that use the slow frequencies alone need every second one; fast ones need the first half."""
    for used, theta in ((slice(0, 4), 10000.0**0.5), (slice(4, 8), 10000.0)):
        model = rotated('mha', n_embd=32)
        with torch.no_grad():
            for block in model.transformer.h:
                for part in block.attn.c_attn.weight[:64].unflatten(0, (8, 8)), block.attn.c_attn.bias[:64].view(8, 8):
                    part[:, used.start : used.stop] *= 100
        mla = turned(model, torch.zeros(4).cdouble(), 16, 4)
        assert mla.config.rope_theta == pytest.approx(theta)


@pytest.mark.parametrize(('turn', 'theta'), [([0, 1, 0, 0], 10000.0), ([0, 0, 1, 0], 10000.0**0.5)])
def test_a_frequency_whose_turn_is_known_need_not_stay(turn, theta):
    """Where all keys are equally far away, the constant turn is right: frequencies 0 and 2 stay, or 0 and 1."""
    model = rotated('mha')
    turn = torch.tensor(turn).to(torch.complex128)
    assert turned(model, turn, 16, 4).config.rope_theta == pytest.approx(theta)


def test_the_shared_key_is_that_of_the_heads_that_ask_for_it():
    """Of two key heads one has large keys and queries of nearly 0, so the other one's scores are kept exactly."""
    model, idx = rotated('gqa'), batches(1, seed=7)[0]
    block = model.transformer.h[0]
    with torch.no_grad():
        for rows in block.attn.c_attn.weight, block.attn.c_attn.bias:
            rows[: 2 * d] *= 1e-8
            rows[C : C + d] *= 100
    mla = turned(model, torch.zeros(d // 2).cdouble(), C, d)
    with torch.no_grad():
        x = block.ln_1(model.transformer.wte(idx))
        q, k, _ = block.attn.qkv(x, model.rope)
        exact = block.attn.scale * q @ repeat_heads(k, 4).mT
        new = mla.transformer.h[0].attn
        q, k, _ = new.qkv(x, mla.rope)
    assert (new.scale * q @ k.mT - exact)[:, 2:].abs().max() < 1e-5 * exact[:, 2:].abs().max()


def test_complex_rows_and_back():
    rows = torch.randn(3, 6, 5)
    assert torch.equal(as_real(as_complex(rows)), rows)


def scores_of(model, layer=0):
    block = model.transformer.h[layer]
    return Scores(block.attn, collect_inputs(model, batches())[layer], model.rope)


@pytest.mark.parametrize('shape', SHAPES)
def test_the_scores_on_text_are_those_of_the_model(shape):
    model = rotated(shape)
    x, attention = collect_inputs(model, batches())[1], model.transformer.h[1].attn
    assert x.shape == (32, 16, C)
    with torch.no_grad():
        q, k, _ = attention.qkv(x, model.rope)
        exact = attention.scale * q @ repeat_heads(k, 4).mT
    found = scores_of(model, 1)
    assert_close(found.targets, exact)
    assert_close(found.attention, exact.masked_fill(~torch.ones(16, 16).tril().bool(), -torch.inf).softmax(-1))


def test_the_turn_is_the_mean_over_the_distances_that_are_attended_to():
    """Heads that attend evenly: the mean over all pairs of a query and a key that it sees."""
    model = rotated('gqa')
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:C] = 0
            block.attn.c_attn.bias[:C] = 0
    angles, found = torch.arange(16)[:, None] - torch.arange(16), scores_of(model).mean_turn()
    for i, frequency in enumerate(10000.0 ** (-torch.arange(0, d, 2) / d)):
        even = torch.stack([torch.exp(1j * frequency * angles[t, : t + 1]).mean() for t in range(16)]).mean()
        assert abs(found[i] - even) < 1e-5


def test_fitted_factors_are_those_that_the_scores_were_made_with():
    """Scores of content and of one rotated pair, with other factors for each head, are found again to the ridge."""
    model = rotated('gqa')
    scores, kept = scores_of(model), torch.tensor([0])
    layer = RotatedLayer(model.transformer.h[0], collect_statistics(model, batches())[0], torch.zeros(4).cdouble())
    generator = torch.Generator().manual_seed(3)
    content, rotary = (torch.randn(4, n, dtype=torch.complex128, generator=generator) for n in (4, 1))
    shared, queries, keys = layer.split(kept, content, rotary)
    x = torch.nn.functional.pad(collect_inputs(model, batches())[0], (0, 1), value=1.0)
    q = (x[:, None] @ queries.mT).unflatten(-1, (-1, 2))
    q = torch.view_as_complex(q.contiguous())
    k = torch.view_as_complex((x[:, None] @ keys.mT).unflatten(-1, (-1, 2)).contiguous())
    z = torch.view_as_complex((x @ shared.mT).unflatten(-1, (-1, 2)).contiguous())[:, None] * scores.turn[:, kept]
    scores.targets = scores.scale * (q[..., :4] @ k.mH + (q[..., 4:] * scores.turn[:, kept]) @ z.mH).real
    for found, true in zip(layer.fitted(kept, scores), (content, rotary), strict=True):
        assert (found - true).abs().max() < 0.05 * true.abs().max()


def test_inputs_are_of_evenly_spaced_windows(monkeypatch):
    model, text = rotated('mha'), batches()
    whole = collect_inputs(model, text)[0]
    monkeypatch.setattr('core.convert.factorize_rope.FIT_TOKENS', 256)
    assert_close(collect_inputs(model, text)[0], whole[::2])


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained():
    """A GPT with RoPE after 150 steps on a page of PyTorch's source; half of it for statistics, half for losses."""
    text = inspect.getsource(torch.nn.functional)[:20000]
    tokenizer = CharTokenizer.learn(text)
    ids = torch.tensor(tokenizer.encode(text))
    sizes = dict(block_size=32, n_layer=2, n_head=4, n_embd=64, bias=False, pos='rope', norm='rms', mlp='swiglu')
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        rows = ids[torch.randint(len(ids) - 33, (16, 1), generator=generator) + torch.arange(33)]
        optimizer.zero_grad()
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        optimizer.step()
    windows = ids[: len(ids) // 33 * 33].view(-1, 33)
    return model.double().eval(), [windows[::2, :-1]], windows[1::2]


def rise(model, mla, windows):
    """How much the loss rises."""
    with torch.no_grad():
        return (mla(windows[:, :-1], windows[:, 1:])[1] - model(windows[:, :-1], windows[:, 1:])[1]).item()


@pytest.mark.slow
def test_text_says_which_directions_matter(trained):
    model, text, windows = trained
    statistics = collect_statistics(model, text)
    for n_latent in (16, 32):
        weights = rise(model, to_mla(model, n_latent), windows)
        assert 0 < rise(model, to_mla(model, n_latent, statistics), windows) < 0.9 * weights


@pytest.mark.slow
def test_text_says_which_errors_matter(trained):
    """Errors of keys by the queries' energies and of values by W_O, and not all alike."""
    model, text, windows = trained
    statistics = collect_statistics(model, text)
    plain = to_mla(model, 24, statistics, balance=False)
    assert 0 < rise(model, to_mla(model, 24, statistics), windows) < 0.95 * rise(model, plain, windows)


def pattern_error(model, mla, x):
    """The mean of how much attention the first layer gives to other keys, on inputs x (N, T, C)."""
    patterns = []
    for each in (model, mla):
        attention = each.transformer.h[0].attn
        q, k, _ = attention.qkv(x, each.rope)
        patterns.append(kernels.attention_pattern(q, repeat_heads(k, 4), attention.scale))
    return (patterns[0] - patterns[1]).abs().sum(-1).mean().item() / 2


@pytest.mark.slow
def test_text_says_how_far_back_heads_look_and_what_is_left_to_each(trained):
    """Content keys turned by the mean of what is attended to lose less than others; fitted patterns are closer."""
    model, text, windows = trained
    first, own, x = model.transformer.h[0], collect_statistics(model, text)[0], collect_inputs(model, text)[0]
    assert (RotatedLayer(first, own, Scores(first.attn, x, model.rope).mean_turn()).saved > 0).all()
    converted = [turned(model, lambda turn, power=power: turn**power, 64, 8, text) for power in (0, 1)]
    assert 0 < rise(model, converted[1], windows) < 0.9 * rise(model, converted[0], windows)
    with torch.no_grad():
        x = model.transformer.h[0].ln_1(model.transformer.wte(windows[:, :-1]))
        plain, fitted = (pattern_error(model, mla, x) for mla in (converted[1], published(model, 64, 8, text)))
    assert 0 < fitted < plain


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('gap', ['no queries', 'a frequency without queries', 'a gain of 0'])
def test_weights_that_are_zero_convert_to_finite_ones(gap):
    model = rotated('mha')
    block = model.transformer.h[0]
    with torch.no_grad():
        queries = [block.attn.c_attn.weight[:C], block.attn.c_attn.bias[:C]]
        if gap == 'a frequency without queries':
            queries = [rows.unflatten(0, (-1, d))[:, :2] for rows in queries]
        for rows in queries if 'queries' in gap else [block.ln_1.weight, block.ln_1.bias]:
            rows.zero_()
    text = batches()
    statistics, idx = collect_statistics(model, text), batches(2, seed=7)[0]
    mla = to_mla(model, C, statistics)
    assert (logits(mla, idx) - logits(model, idx)).abs().max() < 1e-9
    mla = to_published_mla(model, statistics, collect_inputs(model, text), 16, 4)
    assert all(bool(tensor.isfinite().all()) for tensor in mla.float().state_dict().values())


def test_what_cannot_be_converted_is_refused_in_one_line():
    statistics, inputs = collect_statistics(rotated('mha'), batches()), collect_inputs(rotated('mha'), batches())
    refused = [
        (lambda: to_mla(rotated('mha', n_rope=4)), 'rotates 4 of the 8 dimensions of each head'),
        (lambda: to_mla(to_mla(rotated('mha'))), 'only a GPT with multi-head attention'),
        (lambda: to_mla(rotated('mha'), C + 1), 'n_latent=33 is outside 1 to n_embd=32'),
        (lambda: to_mla(rotated('mha'), 8, statistics[:1]), '1 layers of statistics for a model of 2'),
        (lambda: to_published_mla(to_mla(rotated('mha')), statistics, inputs), 'only a GPT with multi-head attention'),
        (lambda: to_published_mla(rotated('mha', n_rope=4), statistics, inputs), 'rotates 4 of the 8 dimensions'),
        (lambda: to_published_mla(trained_like(), statistics, inputs), "pos='learned' and no rotations to keep"),
        (lambda: to_published_mla(rotated('mha'), statistics[:1], inputs), '1 layers of statistics'),
        (lambda: to_published_mla(rotated('mha'), statistics, inputs, n_rope=3), 'n_rope=3 must be an even number'),
        (lambda: to_published_mla(rotated('mha'), statistics, inputs, n_rope=10), 'from 2 to the head size, 8'),
        (lambda: collect_inputs(rotated('mha'), []), 'there is no text'),
    ]
    for convert, message in refused:
        with pytest.raises(ValueError, match=message) as error:
            convert()
        assert '\n' not in str(error.value)
