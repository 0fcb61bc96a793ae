"""The models on CUDA against the CPU: logits, losses and gradients, compiled, recomputed and with a scaled loss."""

import pytest
import torch
from support.models import BLOCK, VARIANTS, make, tokens

from core.cli import machine

TOLERANCE = {'float32': 2e-3, 'bfloat16': 0.1, 'float16': 0.02}  # of the root of the mean square


def learn(model, device, dtype='float32', call=None, scale=1.0):
    """Logits, loss and gradients {name: tensor} of one batch, in float32 on the CPU."""
    idx, targets = tokens(3, BLOCK).to(device), tokens(3, BLOCK, seed=1).to(device)
    model.zero_grad()
    with machine.autocast(device, dtype):
        logits, loss = (model if call is None else call)(idx, targets)  # a compiled model has no truth value
    (loss * scale).backward()
    gradients = {name: (p.grad / scale).float().cpu() for name, p in model.named_parameters()}
    return logits.detach().float().cpu(), loss.item(), gradients


def assert_near(one, other, tolerance):
    """The same logits, loss and gradients, to rounding. A parameter's gradient is compared with the whole gradient."""
    assert (one[0] - other[0]).norm() <= tolerance * other[0].norm()
    assert one[1] == pytest.approx(other[1], rel=tolerance)
    whole = sum(float(gradient.square().sum()) for gradient in other[2].values()) ** 0.5
    for name, gradient in other[2].items():
        assert (one[2][name] - gradient).norm() <= tolerance * whole, name


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('variant', VARIANTS)
def test_logits_loss_and_gradients(variant, dtype, device):
    model = make(variant, torch.float32)
    expected = learn(model, 'cpu')
    assert_near(learn(model.to(device), device, dtype), expected, TOLERANCE[dtype])


@pytest.mark.cuda
@pytest.mark.parametrize('variant', ['mha', 'gqa', 'mla', 'mla-rope-all'])
def test_compiled_is_eager(variant, device):
    model = make(variant, torch.float32).to(device)
    assert_near(learn(model, device, call=torch.compile(model)), learn(model, device), TOLERANCE['float32'])


@pytest.mark.cuda
def test_a_compiled_loss_without_logits_is_the_eager_one(device):
    model, idx = make('mla', torch.float32).to(device), tokens(3, BLOCK).to(device)
    targets = tokens(3, BLOCK, seed=1).to(device)
    targets[:, 5:9] = -1
    losses = [call(idx, targets, logits=False)[1] for call in (model, torch.compile(model))]
    gradients = [torch.autograd.grad(loss, model.lm_head.weight)[0] for loss in losses]
    for one, other in (losses, gradients):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize('variant', ['mha', 'gqa', 'mla', 'mla-rope-all'])
def test_recomputed_is_stored(variant, device):
    model = make(variant, torch.float32).to(device).train()
    expected = learn(model, device)
    model.config.recompute = True
    assert_near(learn(model, device), expected, TOLERANCE['float32'])


@pytest.mark.parametrize('variant', ['mha', 'mla'])
def test_a_loss_without_logits_under_a_scaler(variant, device):
    """float16 with a scaled loss: the loss and the gradients that computing all logits gives."""
    model = make(variant, torch.float32).to(device)

    def without_logits(idx, targets):
        return torch.zeros(1), model(idx, targets, logits=False)[1]

    with_all = learn(model, device, 'float16', scale=1024.0)
    mine = learn(model, device, 'float16', call=without_logits, scale=1024.0)
    assert_near((with_all[0], *mine[1:]), with_all, TOLERANCE['float16'])


@pytest.mark.parametrize('variant', ['mha', 'mla'])
def test_the_same_batch_twice_gives_the_same_loss(variant, device):
    model = make(variant, torch.float32).to(device)
    assert learn(model, device)[1] == learn(model, device)[1]


def test_batches_arrive_as_they_were_read(data_dir, device):
    """Through pinned memory, while later ones are read into memory that was freed."""
    from core.text.dataset import TokenData

    data = TokenData(data_dir / 'tiny', 16)
    sent = [machine.to_device(*data.batch(1, i, 8, slice(0, 8)), device) for i in range(50)]
    for i, batch in enumerate(sent):
        for mine, expected in zip(batch, data.batch(1, i, 8, slice(0, 8)), strict=True):
            assert torch.equal(mine.cpu(), expected), i
