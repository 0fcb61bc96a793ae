"""core/cli/machine.py: which device and dtype 'auto' becomes, and what processes agree on."""

import importlib.util
import sysconfig

import pytest
import torch
from support import forking
from support.fake_cuda import FakeCuda
from support.training import torchrun
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from core.cli import machine
from core.cli.errors import UserError
from core.runs import processes
from core.runs.processes import Processes

V100 = T4 = 7
A100, H100 = 8, 9


@pytest.mark.parametrize('gpus, device, expected', [
    ([A100], 'cuda', 'bfloat16'),
    ([H100], 'cuda:0', 'bfloat16'),
    ([V100], 'cuda', 'float16'),
    ([T4], 'cuda:0', 'float16'),
    ([H100, T4], 'cuda', 'bfloat16'),
    ([H100, T4], 'cuda:1', 'float16'),
    ([T4, H100], 'cuda:1', 'bfloat16'),
])  # fmt: skip
def test_bfloat16_where_the_gpu_has_it(gpus, device, expected, monkeypatch):
    """PyTorch emulates bfloat16 on older GPUs and says that they support it."""
    FakeCuda(*gpus).install(monkeypatch)
    assert torch.cuda.is_bf16_supported()
    assert machine.pick_dtype('auto', device) == expected


@pytest.mark.parametrize('gpus, expected', [([], 'cpu'), ([A100], 'cuda')])
def test_the_best_device(gpus, expected, monkeypatch):
    FakeCuda(*gpus).install(monkeypatch)
    assert machine.pick_device() == expected


@pytest.mark.parametrize('gpus, device', [([], 'cuda'), ([], 'cuda:0'), ([A100], 'cuda:1'), ([A100], 'gpu'), ([], '')])
def test_a_device_that_is_missing(gpus, device, monkeypatch):
    FakeCuda(*gpus).install(monkeypatch)
    with pytest.raises(UserError, match=f"^device '{device}' is not available; use --device=cpu"):
        machine.pick_device(device)


@pytest.mark.parametrize('device', ['auto', 'cuda'])
def test_each_process_uses_its_own_gpu_and_no_other(device, monkeypatch):
    for name, value in dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=1).items():
        monkeypatch.setenv(name, str(value))
    with FakeCuda(A100, A100).install(monkeypatch) as cuda:
        _, device = processes.join_processes(machine.pick_device(device))
        assert machine.pick_dtype('auto', device) == 'bfloat16'
        torch.zeros(1, device='cuda')
    assert device == 'cuda:1' and cuda.contexts == {1}


def test_a_gpu_named_by_number_is_the_current_one(monkeypatch):
    with FakeCuda(A100, A100).install(monkeypatch) as cuda:
        assert machine.pick_device('cuda:1') == 'cuda:1'
        torch.zeros(1, device='cuda')
    assert cuda.contexts == {1}


def test_more_processes_than_gpus(monkeypatch):
    for name, value in dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=1).items():
        monkeypatch.setenv(name, str(value))
    FakeCuda(A100).install(monkeypatch)
    with pytest.raises(UserError, match='process 1 of this node has no GPU, as there are only 1'):
        processes.join_processes('cuda')


def test_several_processes_cannot_share_one_gpu(monkeypatch):
    meeting = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=29500)
    for name, value in dict(meeting, RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    FakeCuda(A100, A100).install(monkeypatch)
    with pytest.raises(UserError, match='^cuda:1 cannot be shared by the processes of this node; use --device=cuda'):
        processes.join_processes('cuda:1')


def test_float16_is_for_gpus():
    with pytest.raises(UserError, match='dtype=float16 needs a CUDA GPU, and the device is cpu'):
        machine.pick_dtype('float16', 'cpu')
    with pytest.raises(UserError, match="dtype is 'half'; it must be auto, float32, bfloat16, float16"):
        machine.pick_dtype('half', 'cpu')


def test_a_single_process_agrees_with_itself():
    assert [Processes().agreed_dtype(dtype) for dtype in machine.DTYPES] == list(machine.DTYPES)


# ---- two processes ---------------------------------------------------------------------------------------------------


def in_two_processes(program, tmp_path):
    """The lines that two processes `say` which torchrun starts with `program`, after PREPARE: a set."""
    script = tmp_path / 'program.py'
    script.write_text(PREPARE + program + '\nranks.exit()\n')
    done = forking.run('-m', [*torchrun(2)[1:], script], 240)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split('\n')) - {''}


PREPARE = """
import os, sys
import torch
sys.path.insert(0, os.getcwd())
from core.cli import machine
from core.runs import processes
from model_mla import MLAGPT, MLAConfig

ranks, _ = processes.join_processes('cpu')
torch.set_num_threads(1)
model = MLAGPT(MLAConfig(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=16, pos='rope'), seed=ranks.rank)
whole = lambda tensor: tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor
say = lambda *words: os.write(1, (' '.join(map(str, words)) + '\\n').encode())  # whole lines, of both processes
total = lambda: sum(whole(p.detach()).double().abs().sum().item() for p in model.parameters())
"""


@pytest.mark.slow
def test_every_process_has_the_model_of_rank_zero(tmp_path):
    """fully_shard alone would take each process's own values."""
    printed = in_two_processes(
        """
before = total()
processes.shard(model, 'cpu')
say('rank', ranks.rank, 'changed:', total() != before)
say('whole', total())
""",
        tmp_path,
    )
    assert {'rank 0 changed: False', 'rank 1 changed: True'} < printed
    assert len(printed) == 3


@pytest.mark.slow
def test_processes_that_picked_different_dtypes_use_float32(tmp_path):
    """As CPUs with and without bfloat16 do, and GPUs of two generations."""
    printed = in_two_processes(
        """
for pair in (('bfloat16', 'bfloat16'), ('bfloat16', 'float32'), ('float16', 'bfloat16'), ('float16', 'float16')):
    say(*pair, ranks.agreed_dtype(pair[ranks.rank]))
""",
        tmp_path,
    )
    assert printed == {
        'bfloat16 bfloat16 bfloat16', 'bfloat16 float32 float32', 'float16 bfloat16 float32', 'float16 float16 float16',
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('clipped', [True, False])
def test_all_processes_skip_the_step_whose_gradient_overflowed_in_one(clipped, tmp_path):
    """Loss scaling with sharded gradients, as with fsdp=True and float16: found in one shard, known to all."""
    printed = in_two_processes(
        f"""
processes.shard(model, 'cpu')
from ops.optimizers import adamw, param_groups
optimizer = adamw(param_groups(model.named_parameters(), 0.1), 1e-2, (0.9, 0.95), 'cpu')
scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
x = torch.arange(8)[None] + ranks.rank
for step in range(3):
    scaler.scale(model(x, x, logits=False)[1]).backward()
    if step == 1 and ranks.rank == 1:
        next(model.transformer.h[0].parameters()).grad.to_local()[0] = torch.inf
    before = total()
    if {clipped}:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    say('rank', ranks.rank, 'step', step, 'taken:', total() != before, 'scale:', scaler.get_scale())
""",
        tmp_path,
    )
    expected = [(0, True, 1024.0), (1, False, 512.0), (2, True, 512.0)]
    assert printed == {
        f'rank {rank} step {step} taken: {taken} scale: {scale}' for rank in (0, 1) for step, taken, scale in expected
    }


DENORMALS = """
import torch
from core.cli import machine
from core.runs import processes
machine.set_threads(2)
x = torch.full((1_000_000,), 1e-39)
print(int((x * 0.5 != 0).sum()), int((torch.full((10,), 1e-37) * 0.5 != 0).sum()))
"""


@pytest.mark.slow
def test_denormal_numbers_are_zero_in_every_thread():
    done = forking.run('-c', [DENORMALS])
    assert done.stdout == '0 10\n', done.stderr


def test_the_kernel_of_attention_is_chosen_only_on_a_gpu(monkeypatch):
    switches = dict(cudnn=None, flash=None, mem_efficient=None)
    for name in switches:
        monkeypatch.setattr(
            torch.backends.cuda, f'enable_{name}_sdp', lambda on, name=name: switches.update({name: on})
        )
    machine.use_attention('cudnn', 'cpu')
    machine.use_attention('auto', 'cuda')
    assert set(switches.values()) == {None}
    machine.use_attention('cudnn', 'cuda')
    assert switches == dict(cudnn=True, flash=False, mem_efficient=False)
    machine.use_attention('flash', 'cuda:1')
    assert switches == dict(cudnn=False, flash=True, mem_efficient=False)


@pytest.mark.skipif(importlib.util.find_spec('flash_attn_interface') is not None, reason='FlashAttention 3 is there')
def test_flash_attention_3_must_be_installed():
    with pytest.raises(UserError, match='not installed'):
        machine.use_attention('fa3', 'cuda')


@pytest.mark.parametrize('missing', ['compiler', 'headers'])
def test_what_the_compiler_needs_is_named(missing, tmp_path, monkeypatch):
    def no_compiler():
        raise InvalidCxxCompiler

    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(cpp_builder, 'get_cpp_compiler', no_compiler if missing == 'compiler' else lambda: 'c++')
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
    with pytest.raises(UserError, match='C\\+\\+ compiler' if missing == 'compiler' else 'Python.h'):
        machine.prepare_compiler('cpu')
    (tmp_path / 'Python.h').touch()
    if missing == 'headers':
        machine.prepare_compiler('cpu')
