"""core/speed/planner.py, sizing.py: counts are those of real models, memory and order of times those of real steps."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from support import forking

from core.cli import machine
from core.runs import models
from core.speed import planner, timing
from core.speed.planner import Plan
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops import kernels
from ops.decoding import draw
from ops.optimizers import adamw, param_groups

pytestmark = pytest.mark.slow

SIZES = dict(n_layer=4, n_head=4, n_embd=128, block_size=256, vocab_size=2000)
VARIANTS = {
    'MHA': (GPT, GPTConfig, dict(bias=False)),
    'GQA-2': (GPT, GPTConfig, dict(n_kv_head=2, pos='rope')),
    'MQA': (GPT, GPTConfig, dict(n_kv_head=1, n_layer=1)),
    'MLA, r=64': (MLAGPT, MLAConfig, dict()),
    'MLA, r=40': (MLAGPT, MLAConfig, dict(n_latent=40, n_rope=8, n_latent_q=48, pos='rope', latent_norm=True)),
}
TOLERANCE = 0.01  # of the peak memory of a training step of 1024 tokens or more
TINY = dict(n_layer=1, n_head=4, n_embd=32, block_size=64, vocab_size=100)


def planned(variant, dtype='bfloat16', **changes):
    model_class, config_class, extra = VARIANTS[variant]
    return Plan(model_class, config_class(**{**SIZES, **extra, **changes}), dtype)


def built(plan):
    return plan.model_class(plan.config)


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('variant', VARIANTS)
def test_parameters_flops_and_cache_are_those_of_the_real_model(variant):
    plan = planned(variant)
    model = built(plan)
    assert plan.name == variant
    assert plan.total == model.get_num_params(non_embedding=False)
    assert plan.parameters['attention'] == models.attention_params(model)
    assert plan.parameters.get('positions', 0) == model.get_num_params(False) - model.get_num_params()
    assert plan.parameters['MLP'] == sum(p.numel() for block in model.transformer.h for p in block.mlp.parameters())
    assert plan.training_flops == model.flops_per_token()
    assert plan.cache_bytes == model.init_cache(2, 7, torch.bfloat16).bytes_per_token
    assert planned(variant, 'float32').cache_bytes == model.init_cache(1).bytes_per_token
    in_bits = Plan(plan.model_class, plan.config, 'float32', 'int4')
    assert in_bits.cache_bytes == model.init_cache(1, kind='int4').bytes_per_token < plan.cache_bytes / 2


@pytest.mark.parametrize('variant', VARIANTS)
def test_flops_of_decoding_are_those_that_pytorch_counts(variant):
    logging.getLogger('torch.utils.flop_counter').setLevel(logging.ERROR)  # torch 2.11 warns where Triton is missing
    from torch.utils.flop_counter import FlopCounterMode

    plan = planned(variant)
    for context in (1, 100, 256):
        with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = built(plan).eval()
            cache = model.init_cache(1, context, torch.float32)
            cache.length = context - 1
            model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
        assert plan.decoding_flops(context) == counter.get_total_flops()


def test_named_shapes_are_the_published_ones():
    def mha(name):
        sizes = {key: value for key, value in planner.SHAPES[name].items() if key in GPTConfig.__dataclass_fields__}
        return Plan(GPT, GPTConfig(**sizes))

    assert mha('gpt2').total == 124_439_808
    assert mha('gpt2-xl').total == 1_557_611_200
    assert 6.5e9 < mha('7b').total < 6.9e9 and mha('7b').cache_bytes == 2 * 2 * 32 * 4096
    sizes = dict(planner.SHAPES['deepseek-v3'])
    deepseek = Plan(MLAGPT, MLAConfig(n_latent=int(sizes.pop('n_latents')), **sizes))
    assert deepseek.cache_bytes == 2 * 61 * (512 + 64) and deepseek.config.head_size == 128


def test_memory_is_counted_once_for_all_views_and_until_it_is_freed():
    with planner.LiveBytes() as live:
        a = torch.ones(1000)
        b = a.view(10, 100).t()
        assert live.now == live.peak == 4000
        c = a + 1
        del a
        assert live.now == 8000
        del b, c
        assert (live.now, live.peak) == (0, 8000)


# ---- memory, against real steps --------------------------------------------------------------------------------------


def micro_step(model, sequences, dtype):
    """A forward and backward pass whose gradients are there already, to be measured."""
    idx = torch.randint(model.config.vocab_size, (sequences, model.config.block_size))

    def run():
        with machine.autocast('cpu', dtype):
            loss = model(idx, idx, logits=False)[1]
        loss.backward()

    run()
    return run


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('variant, recompute', [*((variant, False) for variant in VARIANTS), ('MHA', True),
                                                ('MLA, r=40', True)])  # fmt: skip
def test_memory_of_a_training_step_is_that_measured_on_the_cpu(variant, dtype, recompute, monkeypatch):
    plan = planned(variant, dtype)
    model = plan.model_class(replace(plan.config, recompute=recompute))
    for sequences in (4, 12):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, 'EAGER_HEAD_SIZES', 0)  # without patterns, as in sequences longer than these
            measured = timing.peak_bytes(micro_step(model, sequences, dtype))
        predicted = plan.step_bytes(sequences * 256, recompute, 'cpu')['peak']
        assert predicted == pytest.approx(measured, rel=TOLERANCE)


def test_a_vocabulary_whose_logits_exceed_everything_else_is_counted_in_pieces():
    plan = planned('MLA, r=64', 'float32', n_layer=1, n_embd=16, vocab_size=50304)
    measured = timing.peak_bytes(micro_step(built(plan), 8, 'float32'))
    predicted = plan.step_bytes(2048, False, 'cpu')
    assert predicted['peak'] == pytest.approx(measured, rel=TOLERANCE)
    assert measured > 2 * predicted['kept']
    more = [plan.step_bytes(2048, False, device)['loss'] - predicted['kept'] for device in ('cpu', 'cuda')]
    assert 2.5 < more[1] / more[0] < 4, 'a GPU takes all 2,048 rows at once, a CPU 512'


@pytest.mark.parametrize('sequences', [1, 3, 7, 8, 20])
def test_the_largest_batch_is_found_below_and_above_two_pieces_of_the_loss(sequences):
    plan = planned('MHA', n_layer=1, n_embd=64, vocab_size=50304, block_size=1024)
    room = plan.step_bytes(sequences * 1024, False)['peak']
    assert plan.largest_training_batch(room + 1, 1024) == sequences
    assert plan.largest_training_batch(room - 2**20, 1024) < sequences


def test_a_large_batch_takes_few_steps_to_find():
    """With one id in the vocabulary a piece of the loss has 4 million rows, and thousands of batches are in one."""
    plan, tried = planned('MHA', vocab_size=1), []
    step_bytes = plan.step_bytes
    plan.step_bytes = lambda tokens, recompute: tried.append(tokens) or step_bytes(tokens, recompute)
    most = plan.largest_training_batch(80e9, 256)
    assert most > 1000 and len(tried) < 30
    assert step_bytes(256 * most, False)['peak'] <= 80e9 < step_bytes(256 * (most + 1), False)['peak']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('variant, vocab_size', [('MHA', 2000), ('MLA, r=40', 2000), ('MHA', 2)])
def test_memory_of_a_decode_step_is_that_measured_on_the_cpu(variant, vocab_size, dtype):
    plan = planned(variant, dtype, vocab_size=vocab_size)
    model = built(plan).eval().to(machine.DTYPES[dtype])
    cache, token = model.init_cache(512, 8), torch.zeros(512, 1, dtype=torch.int64)

    def step():
        logits = model(token, cache=cache)[0]
        return draw(logits[:, -1]), logits

    with torch.no_grad():
        measured = timing.peak_bytes(step)
    assert 512 * plan.drawing_bytes == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_states_are_those_of_the_real_optimizers(optimizer):
    plan = planned('MLA, r=64', bias=False)
    model = built(plan)
    micro_step(model, 1, 'float32')
    optimizers = [adamw(param_groups(model.named_parameters(), 0.1), 1e-3, (0.9, 0.95), 'cpu')]
    if optimizer == 'muon':
        matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
        kept = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in kept]
        optimizers = [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)]
    found = 0
    for each in optimizers:
        each.step()
        found += sum(
            t.nbytes for state in each.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()
        )
    predicted = plan.state_bytes(optimizer)
    assert predicted['optimizer'] == found
    assert predicted['weights'] == sum(p.nbytes for p in model.parameters())
    assert predicted['gradients'] == sum(p.grad.nbytes for p in model.parameters())
    assert plan.state_bytes(optimizer, share=4) == {what: nbytes / 4 for what, nbytes in predicted.items()}


# ---- time ------------------------------------------------------------------------------------------------------------


def test_the_roofline_by_hand():
    plan = planned('MHA')
    weights = 2 * (plan.total - plan.parameters['positions'])
    cache = 100 * plan.cache_bytes
    fast_memory = plan.decoding_seconds(3, 100, peak=1.0, bandwidth=1e30)
    assert fast_memory == {'memory': 0, 'arithmetic': pytest.approx(3 * plan.decoding_flops(100))}
    fast_arithmetic = plan.decoding_seconds(3, 100, peak=1e30, bandwidth=1.0)
    assert fast_arithmetic == {'memory': pytest.approx(weights + 3 * cache), 'arithmetic': 0}


def test_decoding_is_slower_where_the_roofline_says_so():
    """Loosely: two models whose caches are a small part of MHA's, their speed over MHA's within a factor 4."""
    sizes = dict(n_layer=2, n_head=8, n_embd=256, block_size=4096, vocab_size=64, bias=False)
    plans = [Plan(GPT, GPTConfig(**sizes), 'float32'), Plan(GPT, GPTConfig(**sizes, n_kv_head=1), 'float32'),
            Plan(MLAGPT, MLAConfig(**sizes, n_latent=32), 'float32')]  # fmt: skip
    runs, token, threads = {}, torch.zeros(8, 1, dtype=torch.int64), torch.get_num_threads()
    for plan in plans:
        model = built(plan).eval()
        cache = model.init_cache(8)

        def run(model=model, cache=cache):
            cache.length = 4095
            model(token, cache=cache)

        runs[plan.name] = run
    torch.set_num_threads(1)
    with torch.no_grad():
        seconds = {name: min(times) for name, times in timing.alternate(runs, rounds=9).items()}  # the least disturbed
    torch.set_num_threads(threads)
    predicted = [sum(plan.decoding_seconds(8, 4096, peak=5e10, bandwidth=1e10).values()) for plan in plans]
    for plan, time in zip(plans[1:], predicted[1:], strict=True):
        ratio = predicted[0] / time
        assert ratio > 3, 'the roofline tells them apart'
        assert max(1.2, ratio / 4) < seconds['MHA'] / seconds[plan.name] < 4 * ratio


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def size(prepare, monkeypatch, tmp_path):
    """Runs sizing.py in this process: size(key=value, ...) -> (what it printed, what it wrote as JSON)."""
    monkeypatch.chdir(forking.ROOT)

    def run(**keys):
        printed = prepare('sizing.py', json=tmp_path / 'a.json', **keys).out
        return printed, json.loads((tmp_path / 'a.json').read_text())

    return run


@pytest.fixture
def uncounted(monkeypatch):
    """For what isn't about memory: that of a training step is made up, since counting it takes a second per model."""
    per_token = dict(forward=3000.0, kept=2000.0, backward=4000.0)

    def counted(plan, n_layer, sequences, recompute):
        return {name: n_layer * sequences * plan.counted_length * each for name, each in per_token.items()}

    monkeypatch.setattr(Plan, 'counted_bytes', counted)


def cells(text, label):
    """The cells of all rows with this label in the printed table."""
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('|')]
    return [line[1:] for line in lines if line[0] == label]


def test_how_large_a_batch_fits_an_l4_at_8k_is_one_command(size):
    printed, found = size(gpu='L4', block_size=8192)
    room = 0.9 * 24e9
    assert [model['name'] for model in found['models']] == ['MHA', 'GQA-3', 'MQA', 'MLA, r=384', 'MLA, r=96']
    assert max(map(len, printed.splitlines())) <= 100
    trained, decoded = cells(printed, 'largest batch')
    for model, in_training, in_decoding in zip(found['models'], trained, decoded, strict=True):
        facts = model['decoding']
        most = facts['largest_batch']
        assert in_decoding == f'{most:,}' and int(in_training) == model['training']['plain']['largest_batch']
        each = facts['cache_bytes'] + facts['step_bytes']
        assert facts['weight_bytes'] + most * each <= room < facts['weight_bytes'] + (most + 1) * each
    trained, states = found['models'][0]['training'], sum(found['models'][0]['training']['states'].values())
    plan = Plan(GPT, GPTConfig(block_size=8192, bias=False))
    batches = [trained['plain']['largest_batch'] + more for more in (0, 1)]
    fit, too_many = (states + plan.step_bytes(batch * 8192, recompute=False)['peak'] for batch in batches)
    assert fit <= room < too_many


def test_hours_and_cost_are_those_of_the_stated_mfu_and_price(size, uncounted):
    keys = dict(TINY, gpu='a100-80gb', gpus=4, tokens='1e12', mfu=0.25, n_kv_heads=4, n_latents=8)
    printed, _ = size(**keys)
    assert not cells(printed, 'cost') and 'Cost:' not in printed
    printed, found = size(**keys, price=3)
    found = found['models'][0]['training']
    model = GPT(GPTConfig(**TINY, bias=False))
    seconds = 1e12 * model.flops_per_token() / (0.25 * 4 * 312e12)
    assert found['hours'] == pytest.approx(seconds / 3600) and found['cost'] == pytest.approx(12 * seconds / 3600)
    assert cells(printed, 'cost')[0][0] == f'{found["cost"]:.3g}' and 'Cost: 3 per GPU and hour' in printed


def test_a_model_that_is_too_large_is_said_and_sharing_helps(size):
    keys = dict(shape='7b', n_kv_heads=32, n_latents=512)
    alone, _ = size(**keys, gpu='T4', usable=0.5)
    assert cells(alone, 'the same, recomputing') == [['none fits'] * 2]
    assert cells(alone, 'tokens/s, one sequence') == [['0'] * 2] and cells(alone, 'most of its time') == [[''] * 2]
    shared, found = size(**keys, gpus=8, fsdp=True)
    assert all(int(cell) > 0 for cell in cells(shared, 'the same, recomputing')[0])
    training = found['models'][0]['training']
    assert training['states']['weights'] == found['models'][0]['parameters'] / 2
    parts = [*training['states'].values(), training['gathered'], training['plain']['peak']]
    assert training['plain']['total'] == pytest.approx(sum(parts))


def test_many_models_are_printed_below_one_another(size, uncounted):
    printed, _ = size(**TINY, n_latents='2,3,4,5', n_kv_heads=2)
    assert max(map(len, printed.splitlines())) <= 100
    assert [len(row) for row in cells(printed, 'norms')] == [4, 2]


def test_n_rope_is_about_mla_alone(size, uncounted):
    _, found = size(**TINY, pos='rope', n_rope=16)
    assert len(found['models']) > 2


def test_queries_may_be_wider_than_values_as_deepseeks_are(size):
    printed, found = size(shape='deepseek-v3', gpu='H200', n_kv_heads=56)
    assert 'deepseek-v3: the published layers' in printed
    for model in found['models']:
        assert model['training']['plain']['total'] > 12 * model['parameters']
        assert model['training']['recomputed']['kept'] < model['training']['plain']['kept']


@pytest.mark.parametrize(
    'arguments, expected',
    [
        (['--gpu=H1000'], "gpu is 'H1000'; it must be one of B200, H200, H100 PCIe"),
        (['--gpu='], "gpu is ''; it must be one of"),
        (['--shape=gpt3'], "'gpt3' is no shape; choose gpt2, gpt2-medium"),
        (['--n_head=5'], 'n_embd=768 must be a multiple of n_head=5'),
        (['--n_kv_heads=5'], 'n_head=12 must be a multiple of n_kv_head=5'),
        (['--n_latents=769'], 'n_latent=769 is outside 1 to n_embd=768'),
        (['--n_rope=4'], "n_rope=4 needs pos='rope'"),
        (['--mfu=1.5'], 'mfu is 1.5; it must be at least 0.001 and at most 1'),
        (['--price=-1'], 'price is -1'),
        (['--tokens=0'], 'tokens is 0'),
        (['--vocab_size=0'], 'vocab_size is 0'),
        (['--optimizer=sgd'], "optimizer is 'sgd'; it must be adamw or muon"),
        (['--json=nowhere/x.json'], 'nowhere does not exist'),
    ],
)
def test_bad_input_gets_one_line(arguments, expected):
    done = forking.run('sizing.py', arguments)
    assert done.returncode == 2 and not done.stdout
    errors = [line for line in done.stderr.splitlines() if not line.startswith('command line sets')]
    assert len(errors) == 1 and errors[0].startswith('error: ') and expected in errors[0]
