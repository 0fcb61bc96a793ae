"""AdamW and Muon: which parameters each of them moves, how far, and that a resumed Muon run is the run."""

import pytest
import torch
from support.training import assert_same_curve, assert_same_run, log_of, run, tensors_of

from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.optimizers import OPTIMIZERS, kv_rows, no_parts, orthogonalized, param_groups, slow_down

SIZES = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
MUON = dict(optimizer='muon', gradient_accumulation_steps=4, batch_size=2, dropout=0.1)


def made(model, name, weight_decay, lr, kv_lr=1.0, parts=None):
    """The optimizer that train.py makes of a model."""
    named = list(model.named_parameters())
    slow = kv_rows(named, model.parts)
    groups = param_groups(named, weight_decay, slow, kv_lr)
    optimizer = OPTIMIZERS[name](groups, lr, (0.9, 0.95), 'cpu', parts or model.parts)
    slow_down(optimizer, named, slow, kv_lr)
    for group in optimizer.param_groups:
        group['lr'] = lr * group.get('lr_scale', 1.0)
    return optimizer


def stepped(name, weight_decay=0.0, lr=1e-2, kv_lr=1.0, classes=(MLAGPT, MLAConfig), **sizes):
    """{name: change of that parameter, divided by lr} in the first step of an optimizer, and the model after it."""
    torch.manual_seed(0)
    model = classes[0](classes[1](**SIZES, **sizes))
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    optimizer = made(model, name, weight_decay, lr, kv_lr)
    idx = torch.randint(64, (4, 17))
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    optimizer.step()
    return {key: (tensor.detach() - before[key]) / lr for key, tensor in model.named_parameters()}, model


def is_matrix(name, tensor):
    return '.h.' in name and tensor.dim() == 2


def test_muon_moves_matrices_equally_far_in_all_directions():
    changes, model = stepped('muon')
    for name, whole in changes.items():
        if is_matrix(name, whole):
            for rows in model.parts(name).values() or [slice(None)]:
                change, gradient = whole[rows], model.get_parameter(name).grad[rows]
                strong = torch.linalg.matrix_rank(gradient, rtol=1e-2)
                values = torch.linalg.svdvals(change)[:strong] / (0.2 * max(change.shape) ** 0.5)
                assert not change.numel() or 0.5 < values.min() and values.max() < 1.4, name
                assert not change.numel() or (change * gradient).sum() < 0  # downhill


def test_muon_leaves_the_rest_to_adamw():
    muon, adamw = stepped('muon')[0], stepped('adamw')[0]
    rest = [name for name, change in muon.items() if not is_matrix(name, change)]
    assert {'transformer.wte.weight', 'transformer.wpe.weight', 'transformer.h.0.ln_1.weight'} <= set(rest)
    for name in rest:
        torch.testing.assert_close(muon[name], adamw[name], rtol=0, atol=0)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_matrices_decay_and_vectors_do_not(name):
    plain, decayed = stepped(name)[0], stepped(name, weight_decay=0.5)[0]
    _, model = stepped(name)
    start = dict(MLAGPT(MLAConfig(**SIZES)).named_parameters())
    for key in plain:
        expected = plain[key] - (0.5 * start[key] if plain[key].dim() >= 2 else 0)
        torch.testing.assert_close(decayed[key], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
@pytest.mark.parametrize(
    'sizes', [{}, dict(n_latent_q=8), dict(pos='rope')], ids=['plain', 'compressed queries', 'rope']
)
def test_the_projections_of_latents_learn_at_a_share_of_the_rate(name, sizes):
    """Not the factors of compressed queries, and not the rotated key, which is no product of two matrices."""
    whole, slowed = (stepped(name, weight_decay=0.5, kv_lr=share, **sizes)[0] for share in (1.0, 0.125))
    for key in whole:
        share = torch.ones(len(whole[key]))
        if key.endswith('c_kv_up.weight'):
            share[:] = 0.125
        if key.endswith('c_kv_down.weight'):
            share[:16] = 0.125
        expected = whole[key] * share.view(-1, *[1] * (whole[key].dim() - 1))
        torch.testing.assert_close(slowed[key], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
@pytest.mark.parametrize('kv_heads', [0, 1])
def test_keys_and_values_of_mha_learn_at_a_share_of_the_rate(name, kv_heads):
    sizes = dict(classes=(GPT, GPTConfig), weight_decay=0.5, n_kv_head=kv_heads)
    whole, slowed = (stepped(name, kv_lr=share, **sizes)[0] for share in (1.0, 0.25))
    for key in whole:
        share = torch.ones(len(whole[key]))
        share[32:] = 0.25 if key.endswith('c_attn.weight') else 1
        expected = whole[key] * share.view(-1, *[1] * (whole[key].dim() - 1))
        torch.testing.assert_close(slowed[key], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('classes', [(GPT, GPTConfig), (MLAGPT, MLAConfig)])
def test_at_the_whole_rate_the_groups_are_nanogpts_two_in_its_order(classes):
    model = classes[0](classes[1](**SIZES))
    groups = made(model, 'adamw', 0.1, 1e-3).param_groups
    named = list(model.named_parameters())
    assert [group['weight_decay'] for group in groups] == [0.1, 0.0]
    assert groups[0]['param_names'] == [name for name, p in named if p.dim() >= 2]
    assert groups[1]['param_names'] == [name for name, p in named if p.dim() < 2]


def test_whole_matrices_that_learn_slowly_are_never_copied(monkeypatch):
    """A share for them is a group's; only rows of a matrix are remembered over a step."""
    model = MLAGPT(MLAConfig(**SIZES))
    optimizer = made(model, 'adamw', 0.1, 1e-3, kv_lr=0.25)
    assert not optimizer._optimizer_step_pre_hooks
    assert [group.get('lr_scale', 1) for group in optimizer.param_groups] == [1, 1, 0.25]
    assert {name.split('.')[-2] for name in optimizer.param_groups[2]['param_names']} == {'c_kv_down', 'c_kv_up'}


@pytest.mark.parametrize(
    'classes, sizes',
    [
        ((GPT, GPTConfig), {}),
        ((GPT, GPTConfig), dict(n_kv_head=1, mlp='swiglu')),
        ((MLAGPT, MLAConfig), dict(pos='rope', n_nope=6, n_value=10)),
    ],
)
def test_muon_divides_fused_matrices(classes, sizes):
    """Each part moves as a matrix of its own would: orthogonalized alone, at the rate of its own shape."""
    torch.manual_seed(0)
    changes, model = stepped('muon', classes=classes, **sizes)
    seen = set()
    for name, change in changes.items():
        for part, rows in model.parts(name).items():
            gradient = model.get_parameter(name).grad[rows]
            scaled = 0.2 * max(gradient.shape) ** 0.5 * orthogonalized(0.05 * gradient + 0.95 * 0.05 * gradient).float()
            torch.testing.assert_close(change[rows], -scaled, rtol=0.02, atol=0.02)
            seen.add(part)
    assert seen >= ({'q', 'k', 'v'} if classes[0] is GPT else {'k', 'v', 'kv', 'k_rope'})


def test_muon_on_whole_matrices_is_pytorchs():
    model, theirs = GPT(GPTConfig(**SIZES)), GPT(GPTConfig(**SIZES))
    optimizer = made(model, 'muon', 0.1, 1e-2, parts=no_parts)
    matrices = [p for name, p in theirs.named_parameters() if is_matrix(name, p)]
    reference = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn='match_rms_adamw')
    idx = torch.randint(64, (4, 17))
    for _ in range(3):
        for one in (model, theirs):
            one.zero_grad()
            one(idx[:, :-1], idx[:, 1:])[1].backward()
        for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
        for (name, mine), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
            assert not is_matrix(name, mine) or torch.equal(mine, other), name
        theirs.load_state_dict(model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    'script, keys',
    [
        ('train.py', {}),
        ('train_mla.py', {}),
        ('train_mla.py', dict(pos='rope', optimizer='muon')),
    ],
)
def test_the_share_holds_in_every_iteration_and_over_a_resume(script, keys, data_dir, tmp_path):
    whole, parts, keys = tmp_path / 'whole', tmp_path / 'parts', dict(keys, kv_lr=0.25)
    assert run(script, data_dir, whole, **keys).returncode == 0
    assert run(script, data_dir, parts, **keys, max_iters=7).returncode == 0
    other = run(script, data_dir, parts, resume='yes', kv_lr=0.5)
    assert other.returncode == 2 and 'kv_lr=0.5 cannot be applied to the run in' in other.stderr
    assert run(script, data_dir, parts, resume='yes').returncode == 0  # the share is the checkpoint's
    assert_same_run(whole, parts)
    assert torch.load(whole / 'ckpt.pt')['config']['kv_lr'] == 0.25
    assert run(script, data_dir, tmp_path / 'default', **{**keys, 'kv_lr': 1}).returncode == 0
    assert log_of(whole)[15]['loss'] != log_of(tmp_path / 'default')[15]['loss'] != ''


def older(path, **config):
    """Make a checkpoint what versions before this one wrote: no names in the optimizer's groups, and no rules."""
    saved = torch.load(path)
    del saved['learning']
    entries, groups, place = saved['optimizer']['state'], saved['optimizer']['param_groups'], {}
    for group in groups:
        place |= dict(zip(group.pop('param_names'), group['params'], strict=True))
    for group in groups[2:]:  # a group of slow matrices: they stood among the others
        groups.remove(group)
    names = [name for name in dict(saved['model']) if name in place]
    names.sort(key=lambda name: saved['model'][name].dim() < 2)
    ends = [sum(saved['model'][name].dim() >= 2 for name in names), len(names)]
    groups[0]['params'], groups[1]['params'] = list(range(ends[0])), list(range(*ends))
    saved['optimizer']['state'] = {number: entries[place[name]] for number, name in enumerate(names)}
    saved['config'] |= config
    for key in [key for key, value in saved['config'].items() if value is None]:
        del saved['config'][key]
    torch.save(saved, path)


@pytest.mark.parametrize('script', ['train.py', 'train_mla.py'])
@pytest.mark.slow
def test_an_older_run_goes_on_at_the_whole_rate(script, data_dir, tmp_path):
    """Of before there was a share, and of before parameters had names in the optimizer's state."""
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert run(script, data_dir, whole).returncode == 0
    assert run(script, data_dir, parts, max_iters=10).returncode == 0
    older(parts / 'ckpt.pt', kv_lr=None)
    done = run(script, data_dir, parts, resume='yes')
    assert done.returncode == 0, done.stderr
    losses = [next(row['loss'] for row in log_of(folder) if row['iter'] == '19') for folder in (whole, parts)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_an_older_slowed_run_keeps_the_rows_that_it_slowed(data_dir, tmp_path):
    """It slowed the rotated key and the factors of compressed queries too; this says so, and stays so."""
    keys = dict(pos='rope', n_latent_q=8, kv_lr=0.125)
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert run('train_mla.py', data_dir, parts, **keys, max_iters=10).returncode == 0
    older(parts / 'ckpt.pt')
    done = run('train_mla.py', data_dir, parts, resume='yes')
    assert done.returncode == 0 and 'goes on as it began: kv_lr slows all rows of the projections' in done.stderr
    rows = torch.load(parts / 'ckpt.pt')['learning']['slow_rows']
    assert {name.split('.')[-2] for name in rows} == {'c_kv_down', 'c_kv_up', 'c_q_down', 'c_q'}
    assert rows['transformer.h.0.attn.c_kv_down.weight'] == [0, 24]  # r = 16 and 8 rotated ones
    assert run('train_mla.py', data_dir, whole, **keys).returncode == 0
    again = run('train_mla.py', data_dir, parts, resume='yes', max_iters=22)
    assert again.returncode == 0 and 'goes on as it began' not in again.stderr  # recorded by now
    assert torch.load(whole / 'ckpt.pt')['learning']['slow_rows'] != rows


@pytest.mark.slow
def test_an_older_run_of_muon_goes_on_undivided(data_dir, tmp_path):
    assert run('train.py', data_dir, tmp_path, **MUON, max_iters=10).returncode == 0
    saved = torch.load(tmp_path / 'ckpt.pt')
    assert saved['learning']['divides'] is True
    del saved['learning']
    torch.save(saved, tmp_path / 'ckpt.pt')
    done = run('train.py', data_dir, tmp_path, resume='yes', **MUON)
    assert done.returncode == 0 and 'its Muon takes fused matrices, such as c_attn, as one' in done.stderr
    assert torch.load(tmp_path / 'ckpt.pt')['learning']['divides'] is False


@pytest.mark.slow
@pytest.mark.parametrize('script, keys', [('train.py', {}), ('train_mla.py', dict(pos='rope'))])
def test_rows_of_a_sharded_matrix_learn_at_their_rate(script, keys, data_dir, tmp_path):
    keys = dict(keys, kv_lr=0.25, gradient_accumulation_steps=2, batch_size=4)
    assert run(script, data_dir, tmp_path / 'one', **keys).returncode == 0
    done = run(script, data_dir, tmp_path / 'two', processes=2, **keys, fsdp=True)
    assert done.returncode == 0, done.stderr
    assert_same_curve(tmp_path / 'one', tmp_path / 'two')


def test_parameters_without_gradient_are_left_alone():
    model = GPT(GPTConfig(**SIZES))
    frozen = model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    optimizer = made(model, 'muon', 0.1, 1e-2)
    assert not any(frozen is p for group in optimizer.param_groups for p in group['params'])


@pytest.mark.slow
@pytest.mark.parametrize('script', ['train.py', 'train_mla.py'])
def test_a_resumed_muon_run_is_the_run(script, data_dir, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert run(script, data_dir, whole, **MUON).returncode == 0
    assert run(script, data_dir, parts, **MUON, max_iters=7).returncode == 0
    assert run(script, data_dir, parts, **MUON, resume='yes').returncode == 0
    rows = log_of(whole)
    assert float(rows[-1]['val_loss']) < float(rows[0]['val_loss']) - 0.1
    assert any('momentum_buffer' in name for name in tensors_of(torch.load(whole / 'ckpt.pt')))
    # the parts have evaluated in iteration 7 too
    assert [row for row in log_of(parts) if row['iter'] != '7'] == [row for row in rows if row['iter'] != '7']
    (parts / 'log.csv').write_bytes((whole / 'log.csv').read_bytes())
    assert_same_run(whole, parts)


def test_the_optimizer_of_a_run_cannot_change(data_dir, tmp_path):
    assert run('train.py', data_dir, tmp_path, max_iters=1).returncode == 0
    done = run('train.py', data_dir, tmp_path, optimizer='muon', resume='yes')
    assert done.returncode == 2 and 'optimizer=muon cannot be applied to the run in' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('fsdp', [False, True])
def test_muon_in_two_processes(fsdp, data_dir, tmp_path):
    keys = {**MUON, 'dropout': 0.0, 'max_iters': 6}
    assert run('train_mla.py', data_dir, tmp_path / 'one', **keys).returncode == 0
    done = run('train_mla.py', data_dir, tmp_path / 'two', processes=2, **keys, fsdp=fsdp)
    assert done.returncode == 0, done.stderr
    assert_same_curve(tmp_path / 'one', tmp_path / 'two', tolerance=1e-3)  # Newton-Schulz runs in bfloat16
