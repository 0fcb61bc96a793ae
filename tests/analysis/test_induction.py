"""Scores, controls and ablations are right where the right answer is known: planted heads, uniform attention."""

import numpy as np
import pytest
import torch
from support.planted import BOS, IDS, L, planted, random_model, repeats
from torch.nn import functional as F

from analysis import circuits, forward, induction, stats


@pytest.mark.parametrize('layout', [dict(), dict(bos=99), dict(bos=99, max_gap=5), dict(copies=4)])
def test_perfect_heads_score_one_and_uniform_attention_chance(layout):
    these = induction.repeated_sequences(8, 12, np.arange(40), seed=1, **layout)
    N, T = these.tokens.shape
    rows = torch.arange(N)[:, None]
    perfect = torch.zeros(N, 3, T, T)
    perfect[:, :, :, 0] = 1  # all other queries attend to the first token
    perfect[rows, 0, these.query] = F.one_hot(these.match + 1, T).float()
    perfect[rows, 1, these.query] = F.one_hot(these.match, T).float()
    perfect[:, 2, 1:] = torch.eye(T)[:-1]
    scores = induction.pattern_scores(perfect, these)
    for head, name in enumerate(('induction', 'duplicate_token', 'previous_token')):
        assert scores[name][:, head].mean().item() == pytest.approx(1, abs=1e-5), name
    flat = induction.pattern_scores(induction.uniform_pattern(T).expand(N, 1, T, T), these)
    assert flat['induction'].mean().item() == pytest.approx(induction.chance(these), abs=1e-5)


# ---- sequences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('max_gap', [0, 6])
def test_sequences_repeat_where_they_say(max_gap):
    these = induction.repeated_sequences(20, 8, IDS, bos=BOS, max_gap=max_gap, seed=1)
    rows = torch.arange(20)[:, None]
    assert torch.equal(these.tokens[rows, these.query], these.tokens[rows, these.match])
    assert these.tokens.shape == (20, 17 + max_gap) and (these.tokens[:, 0] == BOS).all()
    assert these.query[:, -1].eq(16 + max_gap).all()  # the second copy ends the sequence
    distance = these.query - these.match
    assert (distance == distance[:, :1]).all()
    assert len(distance[:, 0].unique()) > 1 if max_gap else (distance == 8).all()
    for row, match in zip(these.tokens, these.match, strict=True):
        once = row[: 1 + 8 + max_gap] if not max_gap else torch.cat((row[: match[0]], row[match]))
        assert len(set(once.tolist())) == len(once)
    again = induction.repeated_sequences(20, 8, IDS, bos=BOS, max_gap=max_gap, seed=1, shuffled=True)
    assert torch.equal(again.query, these.query) and not torch.equal(again.tokens, these.tokens)
    assert torch.equal(again.tokens.sort(1).values, these.tokens.sort(1).values)
    with pytest.raises(ValueError, match='distinct tokens'):
        induction.repeated_sequences(2, 30, IDS)


@pytest.mark.parametrize(
    'length, room, n_ids', [(50, 64, 128), (50, 1024, 50256), (50, 8, 30), (9, 20, 12), (50, 99, 5)]
)
def test_layouts_fit_the_model_and_its_vocabulary(length, room, n_ids):
    found = induction.layouts(length, room, n_ids)
    assert set(found) >= {'main', 'short', 'four copies'} and 4 <= found['main']['length'] <= length
    for layout in found.values():
        assert induction.repeated_sequences(2, ids=np.arange(n_ids), **layout).tokens.size(1) <= room


def test_a_block_that_does_not_fit_is_refused():
    for room, n_ids in ((7, 40), (40, 3)):
        with pytest.raises(ValueError, match='4 distinct tokens'):
            induction.layouts(50, room, n_ids)


def test_in_context_positions_avoid_masked_targets():
    def positions(T, masked):
        targets = torch.zeros(3, T, dtype=torch.int64)
        targets[1, :masked] = -1
        return induction.in_context_positions(targets)

    assert positions(1024, 0) == (50, 500)
    assert positions(64, 0) == (6, 64)
    early, late = positions(64, 33)  # column 32 is the last masked one; it is the target token 34, counted from 1
    assert early > 34 and late == 64
    assert positions(64, 63) is None


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_pattern_scores_against_their_formulas_on_tokens_that_recur():
    rng = torch.Generator().manual_seed(0)
    base = induction.repeated_sequences(3, 6, np.arange(8), copies=3, seed=2)
    tokens = torch.randint(0, 4, base.tokens.shape, generator=rng)
    pattern = torch.rand(3, 2, 18, 18, generator=rng).tril()
    got = induction.pattern_scores(pattern, induction.Repeats(tokens, base.query, base.match))
    for n in range(3):
        for h in range(2):
            A, t = pattern[n, h], tokens[n]
            later = range(6, 18)
            wanted = {
                'induction': [A[i, i - 5] for i in later],
                'prefix_matching': [sum(A[i, j + 1] for j in range(i) if t[j] == t[i]) for i in later],
                'duplicate_token': [A[i, i - 6] for i in later],
                'previous_token': [A[i, i - 1] for i in range(1, 18)],
            }
            for name, values in wanted.items():
                assert got[name][n, h].item() == pytest.approx(float(np.mean(values)), rel=1e-5), name


@pytest.mark.parametrize('kind', ['mha', 'mla'])
@pytest.mark.parametrize('max_gap', [0, 1])
def test_planted_heads_are_found(kind, max_gap):
    model, these = planted(kind), repeats(max_gap=max_gap)
    scores = induction.head_scores(model, these, batch_size=7)
    means = {name: scores[name].mean(0) for name in induction.SCORES}
    assert means['induction'][1, 1] == pytest.approx(1.0, abs=5e-4)
    assert means['prefix_matching'][1, 1] == pytest.approx(1.0, abs=5e-4)
    assert means['previous_token'][0, 0] == pytest.approx(1.0, abs=5e-4)
    for layer, head in ((0, 1), (1, 0)):  # no queries: uniform
        assert means['induction'][layer, head] == pytest.approx(induction.chance(these), abs=1e-6)
    assert means['duplicate_token'][1, 1] < 1e-3
    assert induction.ranked(means['induction'])[0] == (1, 1)
    assert scores['repeat_loss'].mean() < 0.5 < scores['losses'][:, :L].mean()
    copying = circuits.copying_eigenvalues(model, IDS)

    shuffled = induction.head_scores(model, repeats(max_gap=max_gap, shuffled=True), losses=False)['induction']
    random_init = induction.head_scores(forward.untrained(model, 11), these, losses=False)['induction'].mean(0).max()
    low, _ = stats.bootstrap(scores['induction'])
    called = induction.verdict(low, random_init, stats.bootstrap(shuffled)[1], copying)
    assert called.tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_nothing_is_found_in_random_weights(kind):
    model = forward.untrained(planted(kind), 11)
    scores = induction.head_scores(model, repeats())['induction']
    assert scores.mean(0) == pytest.approx(induction.chance(repeats()), abs=0.01)
    others = [induction.head_scores(type(model)(model.config, seed=seed).eval(), repeats(seed=9)) for seed in (1, 2, 3)]
    null = max(other['induction'].mean(0).max() for other in others)
    shuffled = stats.bootstrap(induction.head_scores(model, repeats(shuffled=True))['induction'])[1]
    called = induction.verdict(stats.bootstrap(scores)[0], null, shuffled, np.ones((2, 2)))
    assert not called.any()
    assert induction.is_untrained(model) and not induction.is_untrained(planted(kind))
    assert not induction.is_untrained(torch.nn.Linear(2, 2, bias=False))  # without gains and biases none can tell


def test_a_head_that_attends_by_position_is_not_called_an_induction_head():
    model = planted('mha', by_position=True)
    real, control = (induction.head_scores(model, repeats(shuffled=s))['induction'] for s in (False, True))
    assert real.mean(0)[1, 1] == pytest.approx(1.0, abs=5e-4)
    called = induction.verdict(stats.bootstrap(real)[0], 0.1, stats.bootstrap(control)[1], np.ones((2, 2)))
    assert not called.any()


def test_scores_do_not_depend_on_the_batch_size():
    model, these = random_model('mla'), induction.repeated_sequences(9, 8, np.arange(40), seed=1)
    one, other = (induction.head_scores(model, these, batch_size=size) for size in (2, 9))
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=1e-5, atol=1e-7, err_msg=name)


# ---- ablations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_ablating_the_planted_heads_costs_and_the_others_nothing(kind):
    model, these = planted(kind), repeats()
    base, ablated = induction.ablate_each_head(model, these)
    rise = (ablated - base).mean(-1)
    assert base == pytest.approx(induction.head_scores(model, these)['repeat_loss'], abs=1e-5)
    assert rise[0, 0] > 1 and rise[1, 1] > 1
    assert rise[[0, 1], [1, 0]] == pytest.approx(0, abs=1e-5)
    for head in ((0, 0), (1, 1)):
        assert induction.ablate_together(model, these, [head]) == pytest.approx(ablated[head], abs=1e-5)
    steps = induction.ablate_cumulatively(model, these, [(1, 1), (0, 0)], counts=(1, 2), draws=2)
    assert [step['control_heads'] for step in steps] == [1, 2]
    assert steps[0]['rise'] > 1 and steps[0]['control_rise'] == pytest.approx(0, abs=1e-5)


def test_random_control_heads_come_from_the_same_layers():
    rng = np.random.default_rng(0)
    heads = [(0, 1), (2, 0), (2, 3), (3, 0), (3, 1), (3, 2)]
    for _ in range(20):
        drawn = induction.matched_heads(heads, 4, rng)
        assert [layer for layer, _ in drawn] == [0, 2, 2, 3]  # layer 3 has a single head left
        assert not set(drawn) & set(heads) and len(set(drawn)) == 4


def test_the_loss_on_repeats_counts_predictable_tokens_only():
    model, these = random_model('mha'), induction.repeated_sequences(4, 8, np.arange(39), bos=39, seed=1)
    with torch.no_grad():
        hidden = forward.run(model, these.tokens)
        losses = induction.repeat_losses(model, hidden, these)
    # [BOS] x x: the first token of the second copy is not predictable, the other seven are
    np.testing.assert_allclose(losses, forward.text_losses(model, these.tokens)[:, 9:], rtol=1e-5)
    np.testing.assert_allclose(losses.mean(1), induction.head_scores(model, these)['repeat_loss'], rtol=1e-5)


def test_scores_on_text_are_one_for_perfect_heads_and_chance_for_uniform_ones():
    """Positions whose token occurred before are counted, and all its earlier positions: a b a c b a."""
    tokens = torch.tensor([[0, 1, 0, 2, 1, 0]])
    follow, same, before = torch.zeros(6, 6), torch.zeros(6, 6), torch.zeros(6, 6)
    follow[2, 1] = follow[4, 2] = 1
    follow[5, 1] = follow[5, 3] = 0.5  # after both earlier a
    same[2, 0] = same[4, 1] = 1
    same[5, 0], same[5, 2] = 0.25, 0.75
    before[1:] = torch.eye(6)[:-1]
    scores = induction.natural_scores(torch.stack([follow, same, before])[None], tokens)
    chance = induction.natural_scores(induction.uniform_pattern(6)[None, None], tokens)
    found = {name: [round(x, 6) for x in value[0].tolist()] for name, value in scores.items()}
    assert found['induction'][:2] == [1, 0] and found['duplicate_token'][:2] == [0, 1]
    # the previous token follows an earlier a at positions 2 (its b); it is no earlier a anywhere
    assert found['induction'][2] == round(1 / 3, 6) and found['duplicate_token'][2] == 0
    assert found['previous_token'][2] == 1 and found['previous_token'][0] < 1
    expected = (1 / 3 + 1 / 5 + 2 / 6) / 3  # of uniform attention
    assert chance['induction'].item() == pytest.approx(expected) == chance['duplicate_token'].item()
    assert chance['previous_token'].item() == pytest.approx(sum(1 / (i + 1) for i in range(1, 6)) / 5)


def test_a_text_without_repetition_has_no_score():
    scores = induction.natural_scores(induction.uniform_pattern(4)[None, None], torch.arange(4)[None])
    assert scores['induction'].isnan().all() and scores['duplicate_token'].isnan().all()
    assert not scores['previous_token'].isnan().any()


# ---- natural text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_an_induction_head_is_worth_what_repeated_bigrams_save(kind):
    model, tokens = planted(kind), repeats(24).tokens
    losses = forward.text_losses(model, tokens)
    found = induction.bigram_losses(losses, tokens)
    second = slice(1 + L, None)  # predicted from the second copy: all of its bigrams but the first occurred before
    assert found['share'] == pytest.approx((L - 1) / (2 * L))
    assert found['repeated']['mean'] == pytest.approx(losses[:, second].mean(), rel=1e-5)
    assert found['gain']['mean'] == pytest.approx(found['others']['mean'] - found['repeated']['mean'])
    assert found['gain']['low'] > 1 and found['gain']['low'] < found['gain']['mean'] < found['gain']['high']
    first, both = induction.ablate_on_text(model, tokens, [(1, 1), (0, 0), (1, 0), (0, 1)], [1, 2])
    assert first['repeated']['low'] > 1 > first['others']['mean'] and first['control_heads'] == 1
    assert abs(first['control_repeated']) < 0.3 and both['heads'] == 2


def test_without_induction_a_repeated_bigram_saves_nothing():
    model, tokens = random_model('mha'), repeats(64, ids=np.arange(39), bos=39).tokens
    found = induction.bigram_losses(forward.text_losses(model, tokens), tokens)
    assert abs(found['gain']['mean']) < 0.2 and found['gain']['high'] - found['gain']['low'] < 0.3
