"""train.py --init_from with other people's weights: GPT-2 folders, checkpoints, and MHA that becomes MLA on the way."""

import numpy as np
import pytest
import torch
from support import forking

from core.convert.factorize import collect_statistics, to_mla
from core.runs import checkpoint as checkpoints
from core.runs import models
from core.text.dataset import TokenData
from core.text.tokenizer import CharTokenizer
from core.text.write_dataset import write_dataset
from model import GPT, GPTConfig


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A data set of random letters and an MHA checkpoint of a model for it."""
    folder = tmp_path_factory.mktemp('init_from')
    random = np.random.default_rng(0)
    splits = {'train': random.integers(10, size=4000), 'val': random.integers(10, size=1000)}
    write_dataset(folder / 'data' / 'letters', CharTokenizer('abcdefghij'), splits, source='random letters')
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=10, n_layer=2, n_head=2, n_embd=16, gelu='tanh'))
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    (folder / 'mha').mkdir()
    checkpoints.save(str(folder / 'mha' / 'ckpt.pt'), models.contents(model, {}, iter_num=7))
    return folder, model


def train(script, folder, *flags):
    """Run a script for two iterations that change next to nothing."""
    flags = [f'--data_dir={folder / "data"}', '--dataset=letters', '--block_size=16', '--batch_size=4', *flags]
    flags += ['--max_iters=2', '--warmup_iters=0', '--lr_decay_iters=2', '--learning_rate=1e-9', '--min_lr=0']
    flags += ['--eval_interval=2', '--eval_iters=4', '--gradient_accumulation_steps=1', '--device=cpu', '--threads=1']
    return forking.run(script, flags)


def test_mha_becomes_mla_on_the_way(prepared, tmp_path):
    folder, model = prepared
    done = train('train_mla.py', folder, f'--init_from={folder / "mha"}', f'--out_dir={tmp_path}', '--n_latent=5')
    assert done.returncode == 0, done.stderr
    saved = checkpoints.load(str(tmp_path))
    assert saved['iter_num'] == 2 and saved['model_args']['gelu'] == 'tanh' and saved['model_args']['n_latent'] == 5
    data = TokenData(folder / 'data' / 'letters', 16)
    text = data.windows('train', data.eval_windows('train', 10**6))[0]
    expected = to_mla(model, 5, collect_statistics(model.eval(), [text])).eval()
    trained, idx = models.build_model(saved).eval(), text[:4]
    with torch.no_grad():
        assert (trained(idx, idx)[0] - expected(idx, idx)[0]).abs().max() < 1e-3

    again = train('train_mla.py', folder, f'--init_from={tmp_path}', f'--out_dir={tmp_path / "more"}')
    assert again.returncode == 0, again.stderr  # from an MLA checkpoint, whose latent it keeps
    assert checkpoints.load(str(tmp_path / 'more'))['model_args']['n_latent'] == 5
    for script, flags, complaint in (
        ('train.py', [], 'cannot be converted back'),
        ('train_mla.py', ['--n_latent=6'], 'n_latent=6 cannot be applied'),
        ('train_mla.py', ['--init_from=nowhere'], "'nowhere' is no checkpoint"),
    ):
        refused = train(script, folder, f'--init_from={tmp_path}', f'--out_dir={tmp_path / "no"}', *flags)
        assert refused.returncode == 2 and complaint in refused.stderr and 'Traceback' not in refused.stderr
        assert not (tmp_path / 'no').exists()


@pytest.mark.parametrize('flags', [['--n_latent=16'], ['--n_latent=5', '--n_rope=4']], ids=['whole keys', 'shared key'])
def test_a_model_with_rope_becomes_mla_on_the_way(prepared, tmp_path, flags):
    folder, _ = prepared
    torch.manual_seed(0)
    sizes = dict(block_size=16, vocab_size=10, n_layer=2, n_head=2, n_embd=16, bias=False)
    model = GPT(GPTConfig(**sizes, pos='rope', norm='rms', mlp='swiglu'))
    (tmp_path / 'rope').mkdir()
    checkpoints.save(str(tmp_path / 'rope' / 'ckpt.pt'), models.contents(model, {}))
    out = tmp_path / 'out'
    done = train('train_mla.py', folder, f'--init_from={tmp_path / "rope"}', f'--out_dir={out}', *flags)
    assert done.returncode == 0, done.stderr
    saved = models.build_model(checkpoints.load(str(out))).eval()
    if len(flags) == 1:
        idx = torch.arange(10)[None]
        with torch.no_grad():
            assert (saved(idx, idx)[0] - model.eval()(idx, idx)[0]).abs().max() < 1e-4
    assert (saved.config.shared_rope, saved.config.n_rope) == (len(flags) == 2, 4 * (len(flags) == 2))
