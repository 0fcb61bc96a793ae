"""checkpoint.py: whole or not at all, no code on opening, nanoGPT's keys, and the model that was saved."""

import os
import pickle

import pytest
import torch

from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import models
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.optimizers import adamw, param_groups

SIZES = dict(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=8, bias=True)


def saved(tmp_path, model, **extra):
    path = str(tmp_path / 'ckpt.pt')
    optimizer = adamw(param_groups(model.named_parameters(), 0.1), 1e-3, (0.9, 0.95), 'cpu')
    checkpoints.save(
        path, models.contents(model, {'dataset': 'x'}, optimizer=optimizer.state_dict(), iter_num=7, **extra)
    )
    return path


@pytest.mark.parametrize(
    'model',
    [
        GPT(GPTConfig(**SIZES)),
        GPT(GPTConfig(**SIZES, pos='rope', gelu='tanh')),
        MLAGPT(MLAConfig(**SIZES, n_latent=3)),
        MLAGPT(MLAConfig(**SIZES, pos='rope', latent_norm=True, n_latent_q=5)),
    ],
    ids=['mha', 'mha-rope', 'mla', 'mla-published'],
)
def test_a_saved_model_comes_back(tmp_path, model):
    back = models.build_model(checkpoints.load(saved(tmp_path, model)))
    assert type(back) is type(model) and back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))


def test_an_mha_checkpoint_has_nanogpts_keys_alone(tmp_path):
    checkpoint = checkpoints.load(str(tmp_path) if saved(tmp_path, GPT(GPTConfig(**SIZES))) else '')
    assert set(checkpoint['model_args']) == set(models.NANOGPT_ARGS)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(checkpoint)
    assert checkpoint['attention'] == 'mha' and checkpoint['iter_num'] == 7


def test_nanogpts_checkpoints_are_read(tmp_path):
    model = GPT(GPTConfig(**SIZES))
    state = {f'_orig_mod.{k}': v for k, v in model.state_dict().items()}
    state['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 8, 8)  # its mask, where there was no fused kernel
    args = dict(SIZES, dropout=0.0)
    path = str(tmp_path / 'ckpt.pt')
    torch.save(dict(model=state, model_args=args, iter_num=3, best_val_loss=torch.tensor(2.5), config={}), path)
    back = models.build_model(checkpoints.load(path))
    assert torch.equal(back.lm_head.weight, model.lm_head.weight)


def test_a_file_cut_anywhere_is_refused_in_one_line(tmp_path):
    path = saved(tmp_path, MLAGPT(MLAConfig(**SIZES)))
    whole = open(path, 'rb').read()
    for part in range(50):
        with open(path, 'wb') as file:
            file.write(whole[: len(whole) * part // 50])
        with pytest.raises(UserError, match='truncated or not a checkpoint'):
            checkpoints.load(path)


def test_opening_never_runs_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / 'ran'),))

    for name, write in (('torch', lambda o, f: torch.save(o, f)), ('plain', lambda o, f: pickle.dump(o, f))):
        path = tmp_path / f'{name}.pt'
        with open(path, 'wb') as file:
            write({'model': {}, 'model_args': Payload()}, file)
        with pytest.raises(UserError):
            checkpoints.load(str(path))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    ('change', 'complaint'),
    [
        (lambda c: c.pop('model_args'), "lacks 'model' or 'model_args'"),
        (lambda c: c['model'].pop('transformer.wte.weight'), 'an embedding of'),
        (lambda c: c['model_args'].update(n_layer=2), '1 layers .* not 2'),
        (lambda c: c['model_args'].update(n_layer=1000, n_embd=65536, n_head=1), '1 layers .* not 1000'),
        (lambda c: c['model_args'].update(n_layer=10**9), 'n_layer is 1000000000; it must be at least 1 and at most'),
        (lambda c: c['model_args'].update(n_layer=1.0), 'n_layer is a float'),
        (lambda c: c['model_args'].update(bias=None), 'bias is a NoneType'),
        (lambda c: c['model_args'].update(n_embd=9), 'must be a multiple'),
        (lambda c: c['model_args'].update(n_experts=2), 'n_experts'),
        (lambda c: c.update(attention='gqa'), "attention is 'gqa'"),
        (lambda c: c.update(attention='mha'), "don't make a model|don't fit"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, complaint):
    path = saved(tmp_path, MLAGPT(MLAConfig(**SIZES)))
    content = torch.load(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(UserError, match=complaint):
        models.build_model(checkpoints.load(path))


def test_a_disk_that_refuses_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = saved(tmp_path, GPT(GPTConfig(**SIZES)))
    before = open(path, 'rb').read()

    def full(obj, file):
        file.write(b'half of it')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(UserError, match='No space left on device'):
        checkpoints.save(path, {'model': {}})
    assert open(path, 'rb').read() == before and os.listdir(tmp_path) == ['ckpt.pt']


def test_the_background_writer_saves_what_was_there_when_asked(tmp_path):
    tensor, writer, path = torch.zeros(3), checkpoints.Writer(), str(tmp_path / 'ckpt.pt')
    writer.save(path, {'model': {'a': tensor, 'b': tensor}, 'n': [1]}, [str(tmp_path / 'ckpt_best.pt')])
    tensor += 1
    writer.wait()
    back = torch.load(path)
    assert back['model']['a'].tolist() == [0, 0, 0] and back['n'] == [1]
    assert back['model']['a'].data_ptr() == back['model']['b'].data_ptr()
    assert torch.load(tmp_path / 'ckpt_best.pt')['model']['a'].tolist() == [0, 0, 0]
    writer.save(str(tmp_path / 'nowhere' / 'ckpt.pt'), {})
    with pytest.raises(UserError, match="can't be written"):
        writer.wait()
