"""The scripts on Apple's GPUs, pretended on a CPU: none needs float64 there, or an operand on another device."""

import pytest
import torch
from support import forking
from support.pretended_mps import PretendedMPS
from support.training import COMMON, ROOT, log_of

PROGRAM = ROOT / 'tests' / 'support' / 'pretended_mps.py'


def on_mps(script, **keys):
    """The stdout of a script with device='mps' and these keys."""
    arguments = [f'--{key}={value}' for key, value in dict(keys, device='mps').items()]
    done = forking.run(PROGRAM, [script, *arguments])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pretended_device():
    with PretendedMPS():
        x = torch.ones(3, device='mps')
        layer = torch.nn.Linear(3, 3).to('mps')
        assert x.device == layer.weight.device == layer(x).device == torch.device('mps:0')
        assert x.cpu().double().device == torch.device('cpu')
        refused = (
            lambda: x.double(), lambda: x.to(torch.float64), lambda: x.to('cpu', torch.float64),
            lambda: torch.zeros(1, dtype=torch.float64, device='mps'), lambda: torch.ones(3).double().to('mps'),
            lambda: torch.zeros(3).double().copy_(x), lambda: x.numpy(),
        )  # fmt: skip
        for operation in refused:
            with pytest.raises(TypeError):
                operation()
        with pytest.raises(RuntimeError, match='same device'):
            x + torch.ones(3)
        layer(x).sum().backward()
        assert layer.weight.grad.device == torch.device('mps:0')
        assert torch.equal(torch.ones(3).double().to('mps', torch.float32).cpu(), torch.ones(3))


@pytest.fixture(scope='module')
def runs(data_dir, tmp_path_factory):
    """A folder with runs of train.py, of train_mla.py with every kind of layer, and of MLA converted from the first."""
    folder = tmp_path_factory.mktemp('mps')
    keys = dict(COMMON, data_dir=data_dir, max_iters=6, eval_interval=3, dropout=0.1)
    on_mps('train.py', **dict(keys, out_dir=folder / 'mha'))
    on_mps('train_mla.py', **dict(keys, out_dir=folder / 'mla', pos='rope', n_latent_q=12, latent_norm=True))
    on_mps('train_mla.py', **dict(keys, out_dir=folder / 'converted', init_from=folder / 'mha'))
    return folder


@pytest.mark.slow
def test_training(runs):
    for name in ('mha', 'mla', 'converted'):
        rows = log_of(runs / name)
        assert [row['iter'] for row in rows] == list('0123456') and rows[-1]['val_loss']


@pytest.mark.slow
def test_compiling_is_refused(tmp_path):
    done = forking.run(PROGRAM, ['sample.py', f'--out_dir={tmp_path}', '--compile=True', '--device=mps'])
    assert done.returncode == 2 and 'compile=True is for a CPU or an NVIDIA GPU' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mha', 'mla'])
def test_sampling(runs, name):
    text = on_mps('sample.py', out_dir=runs / name, start='abc', num_samples=2, max_new_tokens=20)
    assert text.startswith('abc') and len(text) > 40


@pytest.mark.slow
def test_conversion(runs, data_dir, tmp_path):
    table = on_mps('convert_mla.py', source=runs / 'mha', out_dir=tmp_path, data_dir=data_dir, n_latent=20)
    assert 'MHA' in table and (tmp_path / 'ckpt.pt').exists()


@pytest.mark.slow
def test_induction_heads(runs, data_dir, tmp_path):
    keys = dict(models=f'{runs / "mha"},{runs / "mla"}', out_dir=tmp_path, data_dir=data_dir)
    on_mps('find_induction_heads.py', **keys, sequences=8, resamples=100, controls=1, length=4)
    assert (tmp_path / 'induction.json').exists()
