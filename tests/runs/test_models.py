"""core/runs/models.py: the checkpoints of nanoGPT and its forks, of any age, make the models that they were."""

import re

import numpy as np
import pytest
import torch
from support.training import COMMON, run

from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import models
from core.text.tokenizer import CharTokenizer
from core.text.write_dataset import write_dataset
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11, dropout=0.0, bias=True)
IDS = torch.arange(12)[None] % 11


def nanogpts(tied=True, **changes):
    """A model with random weights and its checkpoint as nanoGPT writes it: no key of ours."""
    model = GPT(GPTConfig(**SIZES, tied=tied)).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(number))
    saved = dict(model=dict(model.state_dict()), model_args=dict(SIZES), iter_num=5, best_val_loss=torch.tensor(2.0))
    return model, {**saved, 'optimizer': None, 'config': dict(dataset='none'), **changes}


def read(saved, tmp_path):
    """The model that a file with this checkpoint makes."""
    torch.save(saved, tmp_path / 'ckpt.pt')
    return models.build_model(checkpoints.load(str(tmp_path / 'ckpt.pt'))).eval()


def test_a_head_that_is_not_tied_stays_apart(tmp_path):
    """nanoGPT before 14 January 2023, and forks: two tensors, and model_args that say nothing."""
    model, saved = nanogpts(tied=False)
    loaded = read(saved, tmp_path)
    assert torch.equal(loaded(IDS, IDS)[1], model(IDS, IDS)[1]) and not loaded.config.tied
    again = models.entries(loaded)
    assert again['model_args']['tied'] is False  # so that nanoGPT, which has no such key, refuses it
    assert set(again['model_args']) == {*SIZES, 'tied'}
    assert torch.equal(again['model']['lm_head.weight'], saved['model']['lm_head.weight'])


def test_counts_follow_an_untied_head():
    tied, untied = (GPT(GPTConfig(**SIZES, tied=tied)) for tied in (True, False))
    assert untied.get_num_params(False) == tied.get_num_params(False) + 11 * 16
    assert untied.get_num_params() == tied.get_num_params()  # the table of embeddings is in no product
    assert untied.flops_per_token() == tied.flops_per_token()


def test_a_tied_checkpoint_is_nanogpts_alone(tmp_path):
    model, saved = nanogpts()
    loaded = read(saved, tmp_path)
    assert torch.equal(loaded(IDS, IDS)[1], model(IDS, IDS)[1])
    assert set(models.entries(loaded)['model_args']) == set(SIZES)


def test_a_tie_that_the_tensors_break_is_an_error(tmp_path):
    _, saved = nanogpts(tied=False)
    saved['model_args']['tied'] = True
    with pytest.raises(UserError, match='output head differs from the embedding that it is tied to'):
        read(saved, tmp_path)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
def test_prefixes_of_wrappers_in_any_order(prefix, tmp_path):
    model, saved = nanogpts()
    saved['model'] = {prefix + name: tensor for name, tensor in saved['model'].items()}
    saved['model'][f'{prefix}transformer.h.0.attn.bias'] = torch.ones(1, 1, 12, 12)  # a mask buffer of old versions
    assert torch.equal(read(saved, tmp_path)(IDS, IDS)[1], model(IDS, IDS)[1])


def test_two_tensors_of_one_name_are_an_error(tmp_path):
    _, saved = nanogpts()
    saved['model']['module.lm_head.weight'] = saved['model']['lm_head.weight'] + 1
    with pytest.raises(UserError, match='holds lm_head.weight twice'):
        read(saved, tmp_path)


def test_numpys_numbers_are_read_without_numpys_code(tmp_path):
    model, saved = nanogpts()
    saved['model_args'] |= dict(vocab_size=np.int64(11), n_layer=np.int32(2), dropout=np.float64(0))
    saved['model_args']['bias'] = np.bool_(True)
    saved |= dict(iter_num=np.int64(7), best_val_loss=np.float32(1.5))
    assert torch.equal(read(saved, tmp_path)(IDS, IDS)[1], model(IDS, IDS)[1])
    loaded = checkpoints.load(str(tmp_path / 'ckpt.pt'))
    assert loaded['iter_num'] == 7 and type(loaded['model_args']['vocab_size']) is int
    assert type(loaded['best_val_loss']) is float and loaded['best_val_loss'] == 1.5


@pytest.mark.parametrize('value', [np.arange(3), np.array('text'), np.datetime64('2026-01-01')])
def test_other_values_of_numpy_are_refused(value, tmp_path):
    _, saved = nanogpts()
    saved['config'] = dict(extra=value)
    torch.save(saved, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='holds more than tensors and plain values|truncated or not a checkpoint'):
        checkpoints.load(str(tmp_path / 'ckpt.pt'))


def test_what_old_files_leave_out_is_in_their_tensors(tmp_path):
    """No vocab_size, and no head where it is tied."""
    model, saved = nanogpts()
    del saved['model_args']['vocab_size'], saved['model']['lm_head.weight']
    assert torch.equal(read(saved, tmp_path)(IDS, IDS)[1], model(IDS, IDS)[1])


def test_mla_of_before_there_was_n_nope_has_its_rotated_dimensions_inside_the_head(tmp_path):
    sizes = SIZES | dict(n_latent=6)
    old = MLAGPT(MLAConfig(**sizes, pos='rope', n_rope=2, n_nope=6)).eval()
    saved = {**models.entries(old), 'config': {}}
    assert saved['model_args']['n_nope'] == 6 and saved['model_args']['n_value'] == 8
    for name in ('n_nope', 'n_value'):
        del saved['model_args'][name]
    loaded = read(saved, tmp_path)
    assert torch.equal(loaded(IDS, IDS)[1], old(IDS, IDS)[1]) and loaded.config.n_nope == 6
    new = MLAGPT(MLAConfig(**sizes, pos='rope', n_rope=2)).config
    assert (new.n_nope, new.n_rope, new.n_value) == (8, 2, 8)  # beside the content


def test_an_optimizer_in_another_order_names_the_way_out(data_dir, tmp_path):
    assert run('train.py', data_dir, tmp_path / 'out', max_iters=2).returncode == 0
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt')
    for name in ('attention', 'learning'):
        del saved[name]
    for group in saved['optimizer']['param_groups']:
        del group['param_names']
    saved['optimizer']['state'] = dict(enumerate(reversed(list(saved['optimizer']['state'].values()))))
    torch.save(saved, tmp_path / 'out' / 'ckpt.pt')
    done = run('train.py', data_dir, tmp_path / 'out', resume='yes')
    assert done.returncode == 2 and done.stderr.count('error:') == 1
    assert re.search(r'nanoGPT before May 2023.*--init_from=\S*ckpt\.pt', done.stderr)
    other = run('train.py', data_dir, tmp_path / 'new', init_from=tmp_path / 'out')
    assert other.returncode == 0, other.stderr


def test_a_checkpoint_of_other_characters_is_not_fine_tuned_in_silence(data_dir, tmp_path):
    """nanoGPT's checkpoint names its data set, whose meta is there."""
    characters = CharTokenizer('abcdefghijk')
    ids = np.arange(400) % 11
    write_dataset(data_dir / 'letters', characters, {'train': ids[:300], 'val': ids[300:]}, source='a test')
    _, saved = nanogpts(config=dict(dataset='letters'))
    (tmp_path / 'nanogpt').mkdir()
    torch.save(saved, tmp_path / 'nanogpt' / 'ckpt.pt')
    keys = {key: COMMON[key] for key in ('dataset', 'batch_size')} | dict(block_size=8, max_iters=1)
    other = run('train.py', data_dir, tmp_path / 'other', **keys, init_from=tmp_path / 'nanogpt', n_head=2, n_embd=16)
    assert other.returncode == 2 and 'was trained on char tokens (11 ids)' in other.stderr
