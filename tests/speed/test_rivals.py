"""core/speed/rivals.py: other models give our logits, and train here and in a separate process."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT, forking

from core.cli.errors import UserError
from core.speed import rivals
from core.speed.rivals import WITHOUT, NanoGPTTraining, SeparateTraining, Setting, Training
from model import GPT, GPTConfig

TWIN = (ROOT / 'tests/support/nanogpt_twin.py').read_text(encoding='utf-8')
SIZES = dict(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def nanogpt(tmp_path):
    """A folder with a model.py as nanoGPT's."""
    (tmp_path / 'model.py').write_text(TWIN)
    return str(tmp_path)


@pytest.fixture
def setting(tmp_path):
    """A Setting on random tokens."""
    for split in ('train', 'val'):
        np.random.default_rng(0).integers(SIZES['vocab_size'], size=2000, dtype=np.uint16).tofile(
            tmp_path / f'{split}.bin'
        )
    return Setting(str(tmp_path), batch_size=4, block_size=16, seed=1, device='cpu', dtype='float32', compile=False)


def scaled_up(**settings):
    """A GPT in eval mode whose weights are larger than at the start: attention and biases then change the logits."""
    model = GPT(GPTConfig(**SIZES, **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def prompt():
    return torch.randint(SIZES['vocab_size'], (1, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('bias', [False, True])
def test_nanogpt_with_our_weights_gives_our_logits(nanogpt, bias, capsys):
    ours = scaled_up(bias=bias)
    theirs = rivals.nanogpt_model(nanogpt, ours, prompt())
    assert type(theirs) is not GPT
    torch.testing.assert_close(theirs(prompt())[0], ours(prompt())[0])
    assert theirs.lm_head.weight.data_ptr() != ours.lm_head.weight.data_ptr(), 'training one must not train the other'
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('settings', [dict(bias=False), dict(bias=True), dict(bias=True, gelu='tanh')])
def test_hugging_face_with_our_weights_gives_our_logits(settings):
    ours = scaled_up(**settings)
    theirs = rivals.huggingface_model(ours, prompt())
    torch.testing.assert_close(theirs(prompt()).logits[:, -1:], ours(prompt())[0], rtol=1e-4, atol=1e-4)


def test_a_model_that_computes_something_else_is_refused(nanogpt):
    Path(nanogpt, 'model.py').write_text(TWIN.replace('SCALE = None', 'SCALE = 1.0'))
    with pytest.raises(UserError, match="nanoGPT's logits differ"):
        rivals.nanogpt_model(nanogpt, scaled_up(bias=False), prompt())
    Path(nanogpt, 'model.py').write_text(TWIN.replace('F.gelu(self.c_fc(x))', 'self.c_fc(x) * float("nan")'))
    with pytest.raises(UserError, match="nanoGPT's logits differ"):
        rivals.nanogpt_model(nanogpt, scaled_up(bias=False), prompt())


def test_a_batch_gathered_row_by_row_has_targets_one_token_later(setting):
    training = NanoGPTTraining(GPT(GPTConfig(**SIZES)), setting)
    training.data = np.arange(1000, dtype=np.uint16)
    x, y = training.batch()
    assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == torch.int64
    assert (y == x + 1).all() and (x.diff(dim=1) == 1).all()
    assert len(set(x[:, 0].tolist())) > 1


def losses(training, steps=2):
    """The loss on one fixed batch before and after some steps."""
    x, y = torch.arange(16)[None], torch.arange(1, 17)[None]

    def loss():
        with torch.no_grad():
            return training.model.eval()(x, y)[1].item()

    before = loss()
    training.model.train()
    for _ in range(steps):
        training.run()
    return before, loss()


@pytest.mark.parametrize('leave_out', WITHOUT)
def test_a_step_without_an_optimization_is_the_same_step(setting, leave_out):
    whole, less = (Training(GPT(GPTConfig(**SIZES)), setting, part) for part in ('', leave_out))
    before, after = losses(whole)
    assert before != after
    assert losses(less) == (before, pytest.approx(after, abs=1e-6))


def test_nanogpts_steps_start_from_our_weights_and_train(nanogpt, setting):
    ours = GPT(GPTConfig(**SIZES)).eval()
    theirs = NanoGPTTraining(rivals.nanogpt_model(nanogpt, ours, prompt()), setting)
    before, after = losses(theirs)
    assert before == pytest.approx(losses(Training(ours, setting))[0], abs=1e-5)
    assert before != after


@pytest.fixture
def quickly_started(monkeypatch):
    """A process of one's own takes no seconds to import everything."""
    monkeypatch.setattr(sys, 'executable', forking.interpreter())


def test_steps_in_a_separate_process(nanogpt, setting, quickly_started, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # any folder will do, and a relative --nanogpt means this one
    monkeypatch.setenv('PYTHONPATH', '')
    for options in (dict(nanogpt='.'), dict(leave_out='loss')):
        with SeparateTraining('it', setting, GPTConfig(**SIZES), **options) as training:
            training.run()
            # gradients and AdamW's two moments are at least as large as the two MLPs' weights
            assert training.peak_bytes() > 2 * 8 * 32 * 32 * 4
            process = training.process
        assert process.returncode == 0
    assert capfd.readouterr().out == '', 'only the parent prints'


def test_a_separate_process_that_fails_says_why_in_one_line(setting, quickly_started, tmp_path, nanogpt, capfd):
    with (
        pytest.raises(UserError, match=f"^nanoGPT can't be measured: {tmp_path}/none/model.py is missing"),
        SeparateTraining('nanoGPT', setting, GPTConfig(**SIZES), nanogpt=str(tmp_path / 'none')),
    ):
        pass
    assert capfd.readouterr().err == ''
    Path(nanogpt, 'model.py').write_text('import a_module_that_is_missing')
    with (
        pytest.raises(UserError, match='its process ended, with the error above'),
        SeparateTraining('nanoGPT', setting, GPTConfig(**SIZES), nanogpt=nanogpt),
    ):
        pass
    assert "No module named 'a_module_that_is_missing'" in capfd.readouterr().err
