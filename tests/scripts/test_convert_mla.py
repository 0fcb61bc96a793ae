"""convert_mla.py from the command line: what it prints, writes and refuses."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from support import ROOT

from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import models
from core.text.dataset import TokenData
from core.text.tokenizer import CharTokenizer
from core.text.write_dataset import write_dataset
from model import GPT, GPTConfig

C = 16
CHARS = 'abcdefghij'


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """Scripts run in the repository's root, on a small data set and a model that is far from its initial values."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    random = np.random.default_rng(0)
    splits = {'train': random.integers(10, size=4000), 'val': random.integers(10, size=1000)}
    write_dataset(tmp_path / 'data' / 'letters', CharTokenizer(CHARS), splits, source='random letters')
    save_model(tmp_path / 'mha')


def save_model(folder, dataset='letters', **changes):
    torch.manual_seed(0)
    sizes = dict(block_size=16, vocab_size=10, n_layer=2, n_head=2, n_embd=C)
    model = GPT(GPTConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder.mkdir(exist_ok=True)
    meta = {'tokenizer': 'char', 'chars': CHARS, 'vocab_size': 10}
    contents = models.contents(model, {'dataset': dataset}, tokenizer=meta, corpus='random letters', iter_num=7)
    checkpoints.save(str(folder / 'ckpt.pt'), contents)


def convert(monkeypatch, tmp_path, *flags):
    """Run the script on the model; returns the folder that it writes to."""
    common = [f'--source={tmp_path / "mha"}', f'--out_dir={tmp_path / "mla"}', f'--data_dir={tmp_path / "data"}']
    monkeypatch.setattr(sys, 'argv', ['convert_mla.py', *common, '--device=cpu', '--threads=1', *flags])
    try:
        runpy.run_path('convert_mla.py', run_name='__main__')
    except SystemExit as end:
        assert not end.code
    return tmp_path / 'mla'


def test_a_checkpoint_that_is_like_any_other(monkeypatch, tmp_path, capsys):
    folder = convert(monkeypatch, tmp_path, '--n_latent=6', f'--json={tmp_path / "out.json"}')
    saved = checkpoints.load(str(folder))
    model = models.build_model(saved).eval()
    assert saved['attention'] == 'mla' and saved['model_args']['n_latent'] == 6 and saved['iter_num'] == 0
    assert saved['tokenizer']['chars'] == CHARS and saved['corpus'] == 'random letters'
    assert saved['config']['dataset'] == 'letters'
    report = json.loads((tmp_path / 'out.json').read_text())
    before, after = report['rows']
    assert report['corpus'] == 'random letters'
    assert (before['method'], before['n_latent'], after['method'], after['n_latent']) == ('MHA', None, 'data', 6)
    assert before['cache_bytes_per_token'] == 2 * 2 * C * 4 and after['cache_bytes_per_token'] == 2 * 6 * 4
    assert after['cache_saved'] == pytest.approx(1 - 6 / (2 * C))
    assert after['rise'] == pytest.approx(after['val_loss'] - before['val_loss'])
    data = TokenData(tmp_path / 'data' / 'letters', 16)
    with torch.no_grad():
        losses = model.window_losses(*data.windows('val', data.eval_windows('val', 10**6)))
    assert after['val_loss'] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert after['val_stderr'] == pytest.approx((losses.std() / len(losses) ** 0.5).item(), rel=1e-3)
    out = capsys.readouterr().out
    assert f'{after["val_loss"]:.4f}' in out and str(folder / 'ckpt.pt') in out


@pytest.mark.parametrize('flags', [[], ['--method=weights'], ['--balance=False']])
@pytest.mark.parametrize('n_latent', [C, C - 1])
def test_full_rank_costs_nothing(monkeypatch, tmp_path, flags, n_latent):
    convert(monkeypatch, tmp_path, f'--n_latent={n_latent}', f'--json={tmp_path / "out.json"}', *flags)
    row = json.loads((tmp_path / 'out.json').read_text())['rows'][1]
    assert abs(row['rise']) < 1e-5 and row['rise_stderr'] < 1e-5


def test_to_grouped_queries_and_from_them_to_mla_of_the_same_cache(monkeypatch, tmp_path, capsys):
    save_model(tmp_path / 'mha', n_head=4)
    gqa = convert(monkeypatch, tmp_path, '--n_kv_head=1', f'--out_dir={tmp_path / "gqa"}') and tmp_path / 'gqa'
    pooled = models.build_model(checkpoints.load(str(gqa)))
    assert pooled.config.n_kv_head == 1 and 'mean-pooled' in capsys.readouterr().out
    mla = convert(monkeypatch, tmp_path, f'--source={gqa}', f'--json={tmp_path / "out.json"}')
    converted = models.build_model(checkpoints.load(str(mla)))
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert [row['method'] for row in rows] == ['MQA', 'data'] and converted.config.n_latent == 2 * 1 * C // 4
    assert rows[0]['cache_bytes_per_token'] == rows[1]['cache_bytes_per_token'] and abs(rows[1]['rise']) < 1e-5


@pytest.mark.parametrize('basis', ['hadamard', 'components', 'balanced'])
def test_another_basis_costs_nothing_of_a_conversion_and_of_an_mla_model(basis, monkeypatch, tmp_path):
    report, flags = tmp_path / 'out.json', (f'--json={tmp_path / "out.json"}', f'--basis={basis}')
    plain = convert(monkeypatch, tmp_path, '--n_latent=6', flags[0])
    expected = json.loads(report.read_text())['rows'][1]['val_loss']
    convert(monkeypatch, tmp_path, '--n_latent=6', f'--out_dir={tmp_path / "rotated"}', *flags)
    assert json.loads(report.read_text())['rows'][1]['val_loss'] == pytest.approx(expected, abs=1e-5)
    convert(monkeypatch, tmp_path, f'--source={plain}', f'--out_dir={tmp_path / "again"}', *flags)
    before, after = json.loads(report.read_text())['rows']
    assert (before['method'], after['method']) == ('MLA, r=6', basis) and abs(after['rise']) < 1e-5
    with pytest.raises(UserError, match='MLA already'):
        convert(monkeypatch, tmp_path, f'--source={plain}', f'--out_dir={tmp_path / "more"}', '--n_latent=4', *flags)
    with pytest.raises(UserError, match='basis is for a latent'):
        convert(monkeypatch, tmp_path, f'--out_dir={tmp_path / "gqa"}', '--n_kv_head=1', *flags)


def test_weights_alone_need_no_text(monkeypatch, tmp_path, capsys):
    save_model(tmp_path / 'mha', dataset='')
    with pytest.raises(UserError, match='--dataset'):
        convert(monkeypatch, tmp_path)
    folder = convert(monkeypatch, tmp_path, '--method=weights', f'--json={tmp_path / "out.json"}')
    assert models.build_model(checkpoints.load(str(folder))).config.n_latent == C // 2
    assert 'rise' not in json.loads((tmp_path / 'out.json').read_text())['rows'][1]
    assert 'loss' not in capsys.readouterr().out


@pytest.mark.slow
def test_sweep(monkeypatch, tmp_path, capsys):
    folder = convert(monkeypatch, tmp_path, '--sweep=16,8,4', f'--json={tmp_path / "out.json"}')
    assert sorted(path.name for path in folder.iterdir()) == ['conversion.png']
    assert (folder / 'conversion.png').read_bytes().startswith(b'\x89PNG')
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert [row['n_latent'] for row in rows] == [None] + 3 * [16] + 3 * [8] + 3 * [4]
    assert {row['method'] for row in rows[1:4]} == {'weights', 'data', 'data, not balanced'}
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith('data')]) == 6


def test_a_gpt2_folder(monkeypatch, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=C, n_positions=16, vocab_size=10))
    model.save_pretrained(tmp_path / 'gpt2')
    flags = [f'--source={tmp_path / "gpt2"}', '--dataset=letters', f'--n_latent={C - 1}']
    saved = checkpoints.load(str(convert(monkeypatch, tmp_path, *flags)))
    ours, idx = models.build_model(saved).eval(), torch.arange(10)[None]
    assert ours.config.gelu == 'tanh' and 'as published' in saved['corpus']
    with torch.no_grad():
        assert (ours(idx, idx)[0] - model.eval()(idx).logits).abs().max() < 1e-5


def test_an_existing_checkpoint_stays(monkeypatch, tmp_path):
    folder = convert(monkeypatch, tmp_path, '--n_latent=6')
    before = (folder / 'ckpt.pt').read_bytes()
    with pytest.raises(UserError, match='overwrite'):
        convert(monkeypatch, tmp_path, '--n_latent=4')
    assert (folder / 'ckpt.pt').read_bytes() == before
    convert(monkeypatch, tmp_path, '--n_latent=4', '--overwrite=True')
    assert checkpoints.load(str(folder))['model_args']['n_latent'] == 4
    with pytest.raises(UserError, match='not MLAGPT'):
        convert(monkeypatch, tmp_path, f'--source={folder}', '--overwrite=True')


@pytest.mark.parametrize(
    'flags, complaint',
    [
        (['--source=nowhere'], "'nowhere' is no checkpoint"),
        (['--n_latent=17'], 'outside 1 to n_embd=16'),
        (['--sweep=8,x'], "sweep is '8,x'"),
        (['--method=magic'], 'must be data or weights'),
        (['--dataset=missing'], 'missing'),
        (['--eval_tokens=0'], 'at least 2'),
    ],
)
def test_mistakes_get_a_line_and_write_nothing(monkeypatch, tmp_path, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        convert(monkeypatch, tmp_path, *flags)
    assert not (tmp_path / 'mla').exists()


@pytest.mark.slow
def test_rope_stays_whole_or_becomes_one_shared_key(monkeypatch, tmp_path):
    save_model(tmp_path / 'mha', pos='rope', norm='rms', bias=False)
    report = tmp_path / 'out.json'
    whole = models.build_model(
        checkpoints.load(str(convert(monkeypatch, tmp_path, '--n_latent=16', f'--json={report}')))
    )
    before, after = json.loads(report.read_text())['rows']
    assert not whole.config.shared_rope and abs(after['rise']) < 1e-5
    assert (before['cache_bytes_per_token'], after['cache_bytes_per_token']) == (2 * 2 * C * 4, 2 * 16 * 4)
    flags = ['--n_latent=6', '--n_rope=4', '--overwrite=True', f'--json={report}']
    convert(monkeypatch, tmp_path, *flags)
    shared = models.build_model(checkpoints.load(str(tmp_path / 'mla')))
    row = json.loads(report.read_text())['rows'][1]
    assert shared.config.n_rope == 4 and row['cache_bytes_per_token'] == 2 * (6 + 4) * 4
    convert(monkeypatch, tmp_path, '--sweep=16,8', '--n_rope=4', f'--json={report}')
    rows = json.loads(report.read_text())['rows'][1:]
    assert [row['method'] for row in rows] == 2 * ['data, not balanced', 'data']


def test_a_shared_rotated_key_needs_rope_and_text(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="pos='learned' and no rotations"):
        convert(monkeypatch, tmp_path, '--n_rope=4')
    save_model(tmp_path / 'mha', pos='rope')
    with pytest.raises(UserError, match='n_rope needs text'):
        convert(monkeypatch, tmp_path, '--n_rope=4', '--method=weights')
    with pytest.raises(UserError, match='leave out sweep, n_latent, n_rope'):
        convert(monkeypatch, tmp_path, '--n_rope=4', '--n_kv_head=1')
    assert not (tmp_path / 'mla').exists()


def test_text_in_other_tokens_is_refused(monkeypatch, tmp_path):
    splits = {'train': np.arange(4000) % 10, 'val': np.arange(1000) % 10}
    write_dataset(tmp_path / 'data' / 'others', CharTokenizer('klmnopqrst'), splits, source='other letters')
    with pytest.raises(UserError, match='same tokenizer'):
        convert(monkeypatch, tmp_path, '--dataset=others')
    assert not (tmp_path / 'mla').exists()


def test_an_mla_model_is_refused_before_anything_is_printed(monkeypatch, tmp_path, capsys):
    out = convert(monkeypatch, tmp_path, '--n_latent=8')
    capsys.readouterr()
    with pytest.raises(UserError, match='only a GPT with multi-head attention'):
        convert(monkeypatch, tmp_path, f'--source={out}', f'--out_dir={tmp_path}/again')
    assert capsys.readouterr().out == ''


def test_a_copy_of_an_exported_folder_keeps_its_tokenizer(monkeypatch, tmp_path):
    """It used to be recorded as GPT-2's, which sample.py refused to decode with."""
    common = [f'--source={tmp_path / "mha"}', f'--out_dir={tmp_path / "hf"}']
    monkeypatch.setattr(sys, 'argv', ['export_hf.py', *common])
    runpy.run_path('export_hf.py', run_name='__main__')
    flags = [f'--source={tmp_path / "hf"}', '--dataset=letters', '--method=weights', '--n_latent=16']
    saved = checkpoints.load(str(convert(monkeypatch, tmp_path, *flags)))
    assert saved['tokenizer'] == {'tokenizer': 'char', 'chars': CHARS, 'vocab_size': 10}


def test_a_conversion_keeps_the_training_s_settings_and_its_export_says_what_it_is(monkeypatch, tmp_path):
    saved = checkpoints.load(str(tmp_path / 'mha'))
    training = {'dataset': 'letters', 'batch_size': 8, 'max_iters': 2000, 'dtype': 'bfloat16'}
    checkpoints.save(str(tmp_path / 'mha' / 'ckpt.pt'), saved | {'config': training})
    report = tmp_path / 'mla' / 'out.json'  # in a folder that isn't there yet
    folder = convert(monkeypatch, tmp_path, '--n_latent=6', '--batch_size=3', f'--json={report}')
    assert len(json.loads(report.read_text())['rows']) == 2
    assert checkpoints.load(str(folder))['config'] == training | {'data_dir': str(tmp_path / 'data')}
    monkeypatch.setattr(sys, 'argv', ['export_hf.py', f'--source={folder}', f'--out_dir={tmp_path / "hf"}'])
    runpy.run_path('export_hf.py', run_name='__main__')
    card = ' '.join((tmp_path / 'hf' / 'README.md').read_text().split())
    assert f'Converted by convert_mla.py from {tmp_path / "mha"}, which was trained on random letters' in card
    assert 'settings before the conversion, as a command line' in card and 'Trained for' not in card
    assert 'python train.py' in card and '--batch_size=8' in card and '--dtype=bfloat16' in card
