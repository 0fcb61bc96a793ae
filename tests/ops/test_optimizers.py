"""AdamW and Muon: which parameters each of them moves, how far, and that a resumed Muon run is the run."""

import pytest
import torch
from support.training import assert_same_curve, assert_same_run, log_of, run, tensors_of

from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

SIZES = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
MUON = dict(optimizer='muon', gradient_accumulation_steps=4, batch_size=2, dropout=0.1)


def stepped(name, weight_decay=0.0, lr=1e-2, kv_lr=1.0, classes=(MLAGPT, MLAConfig), **sizes):
    """{name: change of that parameter, divided by lr} in the first step of an optimizer, and the model after it."""
    torch.manual_seed(0)
    model = classes[0](classes[1](**SIZES, **sizes))
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    optimizer = model.configure_optimizers(weight_decay, lr, (0.9, 0.95), 'cpu', name, kv_lr)
    idx = torch.randint(64, (4, 17))
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    optimizer.step()
    return {key: (tensor.detach() - before[key]) / lr for key, tensor in model.named_parameters()}, model


def is_matrix(name, tensor):
    return '.h.' in name and tensor.dim() == 2


def test_muon_moves_matrices_equally_far_in_all_directions():
    changes, model = stepped('muon')
    for name, change in changes.items():
        if is_matrix(name, change):
            gradient = model.get_parameter(name).grad
            strong = torch.linalg.matrix_rank(gradient, rtol=1e-2)
            values = torch.linalg.svdvals(change)[:strong] / (0.2 * max(change.shape) ** 0.5)
            assert 0.5 < values.min() and values.max() < 1.4, name
            assert (change * gradient).sum() < 0  # downhill


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
@pytest.mark.parametrize('sizes', [{}, dict(n_latent_q=8)], ids=['plain queries', 'compressed queries'])
def test_the_projections_of_latents_learn_at_a_share_of_the_rate(name, sizes):
    whole, slowed = (stepped(name, weight_decay=0.5, kv_lr=share, **sizes)[0] for share in (1.0, 0.0))
    slow = [key for key in whole if not torch.equal(whole[key], slowed[key])]
    parts = ['c_kv_down', 'c_kv_up'] + ['c_q_down', 'c_q'] * bool(sizes)
    assert sorted(slow) == sorted(f'transformer.h.{layer}.attn.{part}.weight' for layer in range(2) for part in parts)
    for key in slow:  # 1/8 is MLA's default
        torch.testing.assert_close(slowed[key], whole[key] / 8, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
@pytest.mark.parametrize('kv_heads', [0, 1])
def test_keys_and_values_of_mha_learn_at_a_share_of_the_rate(name, kv_heads):
    sizes = dict(classes=(GPT, GPTConfig), weight_decay=0.5, n_kv_head=kv_heads)
    whole, slowed, default = (stepped(name, kv_lr=share, **sizes)[0] for share in (1.0, 0.25, 0.0))
    for key in whole:
        assert torch.equal(default[key], whole[key])
        share = torch.ones(len(whole[key]))
        share[32:] = 0.25 if key.endswith('c_attn.weight') else 1
        expected = whole[key] * share.view(-1, *[1] * (whole[key].dim() - 1))
        torch.testing.assert_close(slowed[key], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('script, default', [('train.py', 1.0), ('train_mla.py', 0.125)])
def test_the_share_holds_in_every_iteration_and_over_a_resume(script, default, data_dir, tmp_path):
    whole, parts, keys = tmp_path / 'whole', tmp_path / 'parts', dict(kv_lr=0.25)
    assert run(script, data_dir, whole, **keys).returncode == 0
    assert run(script, data_dir, parts, **keys, max_iters=7).returncode == 0
    other = run(script, data_dir, parts, resume='yes', kv_lr=0.5)
    assert other.returncode == 2 and 'kv_lr=0.5 cannot be applied to the run in' in other.stderr
    assert run(script, data_dir, parts, resume='yes').returncode == 0  # the share is the checkpoint's
    assert_same_run(whole, parts)
    assert torch.load(whole / 'ckpt.pt')['config']['kv_lr'] == 0.25
    assert run(script, data_dir, tmp_path / 'default', kv_lr=0).returncode == 0
    assert torch.load(tmp_path / 'default' / 'ckpt.pt')['config']['kv_lr'] == default
    assert log_of(whole)[15]['loss'] != log_of(tmp_path / 'default')[15]['loss'] != ''


@pytest.mark.parametrize('given', [{}, dict(kv_lr=0)])
def test_a_run_of_before_there_was_a_share_goes_on_at_the_whole_rate(given, data_dir, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert run('train_mla.py', data_dir, whole, kv_lr=1).returncode == 0
    assert run('train_mla.py', data_dir, parts, kv_lr=1, max_iters=7).returncode == 0
    saved = torch.load(parts / 'ckpt.pt')
    del saved['config']['kv_lr']
    torch.save(saved, parts / 'ckpt.pt')
    done = run('train_mla.py', data_dir, parts, resume='yes', **given)
    assert done.returncode == 0, done.stderr
    losses = [next(row['loss'] for row in log_of(folder) if row['iter'] == '15') for folder in (whole, parts)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_rows_of_a_sharded_matrix_cannot_learn_at_another_rate(data_dir, tmp_path):
    keys = dict(kv_lr=0.5, fsdp=True, gradient_accumulation_steps=2)
    done = run('train.py', data_dir, tmp_path, processes=2, **keys)
    assert done.returncode and 'error: kv_lr slows down some rows of a matrix of MHA, which fsdp shards' in done.stderr


def test_parameters_without_gradient_are_left_alone():
    model = GPT(GPTConfig(**SIZES))
    frozen = model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', 'muon')
    assert not any(frozen is p for group in optimizer.param_groups for p in group['params'])


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
