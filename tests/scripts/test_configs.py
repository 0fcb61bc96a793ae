"""config/: every file is overrides of train.py's keys, and a pair for MHA and MLA is one run but for that."""

import ast
import re
import sys

import pytest
from support import ROOT, forking
from support.keys import keys_of
from support.training import command, log_of

FILES = sorted((ROOT / 'config').glob('*.py'))
TWINS = [file.stem for file in FILES if file.stem.endswith('_mla') and file.with_stem(file.stem[:-4]).exists()]
PAIRS = [file.stem for file in FILES if file.with_name(f'{file.stem}_mla.py').exists()]


@pytest.fixture(autouse=True)
def place(monkeypatch):
    monkeypatch.chdir(ROOT)


def overrides(name):
    """The names that a config file assigns to, by itself or by its sibling, with their values."""
    source = (ROOT / 'config' / f'{name}.py').read_text(encoding='ascii')
    names = {}
    exec(source, names)
    return {key: value for key, value in names.items() if not key.startswith('_')}


def configured(monkeypatch, *arguments):
    """What train.py's configuration comes to with these arguments, a file's name standing for its path."""
    arguments = [str(ROOT / 'config' / f'{a}.py') if not a.startswith('-') else a for a in arguments]
    monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    names = keys_of(ROOT / 'train.py')
    exec((ROOT / 'configurator.py').read_text(encoding='ascii'), names)
    return names['config']


def test_the_published_configs_are_there():
    names = {file.stem for file in FILES}
    assert set(PAIRS) >= {'train_gpt2', 'train_shakespeare_char', 'train_shakespeare_cpu'}
    assert names >= {'finetune_shakespeare', 'eval_gpt2', 'eval_gpt2_medium', 'eval_gpt2_large', 'eval_gpt2_xl'}


@pytest.mark.parametrize('name', [file.stem for file in FILES])
def test_a_file_is_overrides_of_known_keys_after_a_comment(name, monkeypatch):
    source = (ROOT / 'config' / f'{name}.py').read_text(encoding='ascii')
    first, *rest = ast.parse(source).body
    sibling = f'config/{name.removesuffix("_mla")}.py' if name in TWINS else 'config/eval_gpt2.py'
    assert isinstance(first, ast.Assign) or ast.unparse(first) == f"exec(open('{sibling}').read())"
    assert all(isinstance(node, ast.Assign) for node in rest)
    config = configured(monkeypatch, name)
    for key, value in overrides(name).items():
        assert config[key] == value
    if 'half of n_embd' in source:
        assert config['n_latent'] == config['n_embd'] // 2
    head = source.split('\n\n')[0]
    assert all(line.startswith('#') for line in head.splitlines())
    command = re.search(r'\$.* (train\w*\.py) (config/\w+\.py)$', head, re.MULTILINE)
    assert command[2] == f'config/{name}.py'
    assert command[1] == ('train_mla.py' if name.endswith('_mla') else 'train.py')
    folder = re.search(r'--out_dir=(\S+)', head)
    assert folder is None or folder[1] == config['out_dir']


@pytest.mark.parametrize('name', PAIRS)
def test_pairs_differ_in_the_attention_alone(name, monkeypatch):
    mha, mla = overrides(name), overrides(f'{name}_mla')
    different = {key for key in mha.keys() | mla.keys() if mha.get(key) != mla.get(key)}
    assert different - {'latent_norm'} == {'out_dir', 'wandb_run_name', 'attention', 'n_latent'}
    config = configured(monkeypatch, '--attention=mla', '--out_dir=out-mla', f'{name}_mla')
    assert config['attention'] == 'mla' and config['out_dir'] == mla['out_dir'] != mha['out_dir']
    assert 0 < config['n_latent'] <= config['n_embd']
    assert configured(monkeypatch, name)['attention'] == 'mha'


@pytest.mark.parametrize('name', PAIRS)
def test_the_notice_about_a_twin_names_what_its_sibling_sets_too(name, monkeypatch, capsys):
    config, defaults = configured(monkeypatch, f'{name}_mla'), keys_of(ROOT / 'train.py')
    changed = [key for key, value in config.items() if value != defaults[key]]
    assert {'log_interval', 'n_latent'} <= set(changed)
    assert capsys.readouterr().err == f'{ROOT / "config" / name}_mla.py sets {", ".join(changed)}\n'


def test_a_config_file_with_names_of_its_own_trains(data_dir, tmp_path):
    """A file in the manner of nanoGPT's forks, and what the command line says after it."""
    fork = ROOT / 'tests' / 'support' / 'forks' / 'sizes_by_name.py'
    flags = command('train.py', data_dir, tmp_path / 'fork', n_layer=1, max_iters=2)[2:]
    done = forking.run('train.py', [fork, *flags])
    assert done.returncode == 0, done.stderr
    assert 'also assigns what is no key and changes nothing here: size, sizes, name, values' in done.stderr
    assert [row['iter'] for row in log_of(tmp_path / 'fork')] == ['0', '1', '2']


def test_gpt2_takes_half_a_million_tokens_at_a_time_on_any_number_of_gpus(monkeypatch):
    config = configured(monkeypatch, 'train_gpt2')
    tokens = config['batch_size'] * config['block_size'] * config['gradient_accumulation_steps']
    assert tokens == 524288
    assert all(config['gradient_accumulation_steps'] % gpus == 0 for gpus in (1, 2, 4, 8))
    assert config['wandb_project'] == 'gpt2mla' and config['wandb_log'] is True
    source = (ROOT / 'config' / 'train_gpt2.py').read_text(encoding='ascii')
    flags = re.search(r'(--batch_size=\S+) (--gradient_accumulation_steps=\d+)', source)
    small = configured(monkeypatch, 'train_gpt2', *flags.groups())
    assert small['batch_size'] * small['block_size'] * small['gradient_accumulation_steps'] == 491520


def test_files_of_nanogpt_name_only_keys_that_are_here():
    text = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
        wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd
        dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters
        min_lr backend device dtype compile"""
    assert set(text.split()) <= set(keys_of(ROOT / 'train.py'))
