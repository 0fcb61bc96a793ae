"""A new model key stands in three files: the model that reads it, train.py that names it, and the table of bounds."""

import json
import shutil
import subprocess

import pytest
import torch
from support import ROOT, forking
from support.training import COMMON

pytestmark = pytest.mark.slow

# what these scripts import, which starts faster than all
MODULES = tuple(name for name in forking.MODULES if name.startswith(('torch._dynamo', 'core.', 'ops.')))
EDITS = {
    'model.py': [
        ('    kv_rms: float', '    embd_scale: float = 1.0  # factor on the token embeddings\n    kv_rms: float'),
        ('        x = self.transformer.wte(idx)\n', '        x = config.embd_scale * self.transformer.wte(idx)\n'),
    ],
    'train.py': [('kv_rms = 0.0', 'embd_scale = 1.0  # factor on the token embeddings\nkv_rms = 0.0')],
    'core/cli/ranges.py': [("    '[0, 100]': ", "    '(0, 100]': 'embd_scale',\n    '[0, 100]': ")],
}


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """A copy of the repository that has the key."""
    folder = tmp_path_factory.mktemp('copy')
    names = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        if name.endswith('.py') and not name.startswith('tests/'):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name, edits in EDITS.items():
        text = (folder / name).read_text()
        for before, after in edits:
            assert text.count(before) == 1, (name, before)
            text = text.replace(before, after)
        (folder / name).write_text(text)
    return folder


def script(copy, name, **keys):
    """The finished process of a script of the copy."""
    return forking.run(name, [f'--{key}={value}' for key, value in keys.items()], root=copy, modules=MODULES)


@pytest.mark.skipif(shutil.which('git') is None or not (ROOT / '.git').exists(), reason='not a checkout')
@pytest.mark.parametrize('name', ['train.py', 'train_mla.py'])
def test_a_key_of_three_edits_trains_resumes_and_is_exported(name, copy, data_dir, tmp_path):
    keys = COMMON | dict(data_dir=data_dir, out_dir=tmp_path / 'out')
    assert script(copy, name, **keys | dict(max_iters=2), embd_scale=3).returncode == 0
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt')
    assert saved['model_args']['embd_scale'] == saved['config']['embd_scale'] == 3
    again = script(copy, name, out_dir=tmp_path / 'out', data_dir=data_dir, resume='yes', max_iters=4)
    assert again.returncode == 0, again.stderr
    assert torch.load(tmp_path / 'out' / 'ckpt.pt')['config']['embd_scale'] == 3
    other = script(copy, name, out_dir=tmp_path / 'out', data_dir=data_dir, resume='yes', embd_scale=2)
    assert other.returncode == 2 and 'embd_scale=2.0 cannot be applied' in other.stderr
    # a value that the exported model would not know is refused, the default goes out
    refused = script(copy, 'export_hf.py', source=tmp_path / 'out', out_dir=tmp_path / 'hf')
    assert refused.returncode == 2 and 'embd_scale=3' in refused.stderr and not (tmp_path / 'hf').exists()
    assert script(copy, name, **keys | dict(out_dir=tmp_path / 'plain', max_iters=1)).returncode == 0
    done = script(copy, 'export_hf.py', source=tmp_path / 'plain', out_dir=tmp_path / 'hf')
    assert done.returncode == 0, done.stderr
    assert 'embd_scale' not in json.loads((tmp_path / 'hf' / 'config.json').read_text())


def test_help_and_ranges_know_the_key(copy):
    shown = forking.run('train.py', ['--help'], root=copy, modules=MODULES).stdout
    assert 'embd_scale' in shown and 'factor on the token embeddings' in shown
    wrong = script(copy, 'train.py', embd_scale=0)
    assert wrong.returncode == 2 and 'embd_scale is 0.0; it must be above 0' in wrong.stderr
