"""Drawing tokens, generate's rules, and sample.py as its user meets it."""

import os
import pickle
import runpy
import subprocess
import sys

import pytest
import torch
from support import ROOT, forking
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import models
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.decoding import draw

CHARS = '\n !abcdefghijklmnopqrstuvwxyzABCDE'  # 34 characters, of a model that is padded to 40
META = {'format': 1, 'tokenizer': 'char', 'vocab_size': len(CHARS), 'chars': CHARS}


def frequencies(logits, draws=40000, **rules):
    """How often `draw` takes each token, of one row of logits repeated."""
    generator = torch.Generator().manual_seed(0)
    tokens = draw(logits.expand(draws, -1), generator=generator, **rules)
    return torch.bincount(tokens, minlength=logits.numel()) / draws


def expected(logits, temperature=1.0, top_k=None, top_p=None, valid_ids=None):
    """The distribution that the rules mean, written for one row, token by token."""
    logits = logits.double()[:valid_ids] / temperature
    order = logits.argsort(descending=True).tolist()
    if top_k is not None:
        order = order[:top_k]
    p = torch.zeros(logits.numel(), dtype=torch.float64)
    p[order] = logits[order].softmax(0)
    if top_p is not None:
        kept, total = [], 0.0
        for token in order:
            if total >= top_p:
                break
            kept.append(token)
            total += p[token].item()
        allowed = torch.zeros_like(p)
        allowed[kept] = p[kept]
        p = allowed / allowed.sum()
    return p.float()


RULES = [
    dict(),
    dict(temperature=0.5),
    dict(temperature=2.0),
    dict(top_k=3),
    dict(top_k=1),
    dict(top_k=100),
    dict(top_p=0.6),
    dict(top_p=0.001),
    dict(top_p=1.0),
    dict(top_k=4, top_p=0.7),
    dict(top_k=5, temperature=1.5, top_p=0.8),
    dict(valid_ids=5),
    dict(valid_ids=5, top_k=4, top_p=0.9),
]


@pytest.mark.parametrize('rules', RULES, ids=str)
def test_distribution(rules):
    logits = torch.tensor([1.0, 3.0, -1.0, 2.0, 2.5, 0.0, 4.0, 1.5])
    measured, wanted = frequencies(logits, **rules), expected(logits, **rules)
    wanted = torch.nn.functional.pad(wanted, (0, logits.numel() - wanted.numel()))
    assert ((wanted == 0) <= (measured == 0)).all()  # what is excluded never comes
    error = (wanted * (1 - wanted) / 40000).sqrt()
    assert ((measured - wanted).abs() <= 4.5 * error + 1e-9).all()


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(2))
    for rules in (dict(), dict(top_k=3, top_p=0.5)):
        assert torch.equal(draw(logits, temperature=0, **rules), logits.argmax(-1))
    assert torch.equal(draw(logits, temperature=0, valid_ids=4), logits[:, :4].argmax(-1))


def test_rows_are_drawn_independently():
    logits = torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0], [0.0, 0.0, 50.0]])
    assert draw(logits).tolist() == [1, 0, 2]


# ---- generate --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=['mha', 'mla'])
def model(request):
    """A model that likes its padded ids best."""
    sizes = dict(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**sizes)) if request.param == 'mha' else MLAGPT(MLAConfig(**sizes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def generated(model, prompt=(3, 4), new=40, seed=0, **settings):
    settings = dict(valid_ids=len(CHARS), generator=torch.Generator().manual_seed(seed)) | settings
    return model.generate(torch.tensor([prompt]), new, **settings)


def test_padded_ids_are_never_drawn(model):
    original = model.lm_head.forward
    model.lm_head.forward = lambda x: original(x) + 100 * (torch.arange(40) >= len(CHARS))
    assert generated(model, valid_ids=None).max() >= len(CHARS)  # they would be
    for settings in (dict(), dict(temperature=0), dict(use_cache=False), dict(top_k=39), dict(top_p=0.99)):
        assert generated(model, num_samples=4, **settings).max() < len(CHARS)


def test_same_seed_same_text(model):
    one, other = generated(model, num_samples=3), generated(model, num_samples=3)
    assert torch.equal(one, other)
    assert not torch.equal(one, generated(model, num_samples=3, seed=1))
    assert not torch.equal(one[0], one[1])  # samples differ from each other


def test_a_cache_in_few_bits_is_what_generate_uses(model, monkeypatch):
    kinds, init_cache = [], model.init_cache
    monkeypatch.setattr(model, 'init_cache', lambda *a, kind='float': kinds.append(kind) or init_cache(*a, kind=kind))
    free, few = generated(model, temperature=0), generated(model, temperature=0, cache='int8')
    assert kinds == ['float', 'int8'] and free.shape == few.shape


def test_stop_token(model):
    free = generated(model, num_samples=4)
    stop = free[0, 8].item()
    stopped = generated(model, num_samples=4, stop_token=stop)
    for before, after in zip(free[:, 2:].tolist(), stopped[:, 2:].tolist(), strict=True):
        first = after.index(stop) if stop in after else len(after)
        assert before[:first] == after[:first]
        assert set(after[first:]) <= {stop}
    alone = generated(model, stop_token=generated(model)[0, 8].item())
    assert alone.size(1) <= 9 and alone.size(1) < 42  # ends at once when all samples have ended


def test_stop_token_in_the_prompt_does_not_count(model):
    assert generated(model, prompt=(3, 4), new=3, stop_token=39).shape == (1, 5)


def test_callback(model):
    columns = []
    out = generated(model, num_samples=3, on_token=lambda token: columns.append(token.clone()))
    assert torch.equal(torch.stack(columns, dim=1), out[:, 2:])


# ---- sample.py -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, model):
    """A folder with a checkpoint of the model."""
    save(tmp_path, model, tokenizer=META)
    return tmp_path


def save(folder, model, **more):
    checkpoints.save(folder / 'ckpt.pt', models.contents(model, {'dataset': 'letters'}, **more))


@pytest.fixture
def sample(monkeypatch, capsys):
    """sample(script, flags) runs a script in this process and returns what it wrote to (stdout, stderr)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.setenv('OMP_NUM_THREADS', str(torch.get_num_threads()))

    def run(*flags, script='sample.py'):
        monkeypatch.setattr(sys, 'argv', [script, *flags])
        precision = torch.get_float32_matmul_precision()
        try:
            runpy.run_path(script, run_name='__main__')
        finally:
            torch.set_float32_matmul_precision(precision)
        return capsys.readouterr()

    return run


def test_text_on_stdout_alone(sample, folder):
    out, err = sample(f'--out_dir={folder}', '--start=hello', '--num_samples=3', '--max_new_tokens=30')
    texts = out.split('\n---------------\n')
    assert len(texts) == 4 and texts[3] == ''
    for text in texts[:3]:
        assert text.startswith('hello') and len(text) == 5 + 30 and set(text) <= set(CHARS)
    assert 'tokens/s' in err and 'bytes per token' in err
    assert sample(f'--out_dir={folder}', '--start=hello', '--num_samples=3', '--max_new_tokens=30')[0] == out


def test_kind_comes_from_the_checkpoint(sample, folder, model):
    for script in ('sample.py', 'sample_mla.py'):
        _, err = sample(f'--out_dir={folder}', '--num_samples=1', '--max_new_tokens=2', script=script)
        assert f'{models.attention_of(model).upper()},' in err
    with pytest.raises(UserError, match='no checkpoint out-mla'):
        sample('--num_samples=1', script='sample_mla.py')


def test_first_sample_is_shown_as_it_comes(sample, folder, monkeypatch, capsys):
    """Every token is on stdout before the next is drawn, the prompt before all."""
    shown, original = [], GPT.generate

    def generate(self, *args, on_token, **settings):
        shown.append(capsys.readouterr().out)

        def after(token):
            on_token(token)
            shown.append(capsys.readouterr().out)

        return original(self, *args, on_token=after, **settings)

    monkeypatch.setattr(GPT, 'generate', generate)
    out, _ = sample(f'--out_dir={folder}', '--start=hello', '--num_samples=2', '--max_new_tokens=20')
    assert shown[0] == 'hello' and len(shown) == 21
    assert all(len(piece) == 1 for piece in shown[1:])
    assert out.startswith('\n---------------\nhello')


def test_characters_wait_for_all_their_bytes(sample, tmp_path, monkeypatch, capsys):
    save(tmp_path, GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8)),
         tokenizer={'tokenizer': 'byte', 'vocab_size': 256})  # fmt: skip
    pieces, text = [], '\xe4\u20ac\U0001f600b'  # two, three, four bytes and one

    def generate(self, idx, new, on_token, **settings):
        tokens = torch.tensor(list(text.encode()))
        for token in tokens:
            on_token(token[None])
            pieces.append(capsys.readouterr().out)
        return torch.cat((idx[0], tokens))[None]

    monkeypatch.setattr(GPT, 'generate', generate)
    sample(f'--out_dir={tmp_path}', '--start=:', '--num_samples=1')
    assert pieces == [':', '\xe4', '', '', '\u20ac', '', '', '', '\U0001f600', 'b']


def test_stop(sample, folder):
    flags = (f'--out_dir={folder}', '--start=hello', '--num_samples=4', '--max_new_tokens=40')
    free = sample(*flags)[0].split('\n---------------\n')
    stop = next(char for char in free[0][7:] if char.isalpha())
    stopped = sample(*flags, f'--stop={stop}')[0].split('\n---------------\n')
    for before, after in zip(free[:4], stopped[:4], strict=True):
        assert after == 'hello' + before[5:].split(stop)[0]


@pytest.mark.slow
def test_a_compiled_step_draws_the_same_text(sample, folder):
    """By PyTorch's own compiler; tests/model/test_compiled.py has the cases."""
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip('this machine has no C++ compiler')
    flags = (f'--out_dir={folder}', '--start=hello', '--max_new_tokens=20', '--temperature=0', '--device=cpu')
    assert sample(*flags, '--compile=True')[0] == sample(*flags)[0]


def test_a_missing_compiler_is_said_in_one_line(sample, folder, monkeypatch):
    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr('torch._inductor.cpp_builder.get_cpp_compiler', none)
    with pytest.raises(UserError, match='needs a C\\+\\+ compiler'):
        sample(f'--out_dir={folder}', '--device=cpu', '--compile=True')


def test_prompt_from_a_file(sample, folder):
    (folder / 'prompt.txt').write_text('hello', encoding='utf-8')
    out, _ = sample(f'--out_dir={folder}', f'--start=FILE:{folder / "prompt.txt"}', '--max_new_tokens=9')
    assert out == sample(f'--out_dir={folder}', '--start=hello', '--max_new_tokens=9')[0]


@pytest.mark.parametrize('flags, words', [
    (['--start=h\xe9'], "'\xe9'"),
    (['--start='], 'empty'),
    (['--start=FILE:nowhere.txt'], 'nowhere.txt'),
    (['--stop=ab'], 'one token'),
    (['--top_p=0'], 'top_p'),
    (['--top_k=-1'], 'top_k'),
    (['--temperature=-1'], 'temperature'),
    (['--num_samples=0'], 'num_samples'),
    (['--device=tpu'], 'device'),
    (['--dtype=float8'], 'dtype'),
    (['--compile=maybe'], 'compile'),
    (['--compile=True', '--use_cache=False'], 'compile=True'),
    (['--init_from=gpt3'], 'gpt2-xl'),
])  # fmt: skip
def test_mistakes(sample, folder, flags, words):
    with pytest.raises(UserError, match=words) as caught:
        sample(f'--out_dir={folder}', *flags)
    assert '\n' not in str(caught.value)


def test_missing_checkpoint(sample, tmp_path):
    with pytest.raises(UserError, match=r'no checkpoint .*ckpt\.pt'):
        sample(f'--out_dir={tmp_path}')


def nanogpt_checkpoint(folder):
    """A checkpoint as nanoGPT writes it: its seven model_args and its config, and nothing of ours."""
    model = GPT(GPTConfig(block_size=16, vocab_size=len(CHARS), n_layer=1, n_head=2, n_embd=8))
    names = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    state = {f'_orig_mod.{name}': value for name, value in model.state_dict().items()}
    arguments = {name: getattr(model.config, name) for name in names}
    contents = dict(model=state, optimizer={}, model_args=arguments, iter_num=5, best_val_loss=1.0)
    torch.save(contents | {'config': {'dataset': 'letters'}}, folder / 'ckpt.pt')


def test_nanogpt_checkpoint(sample, tmp_path):
    nanogpt_checkpoint(tmp_path)
    flags = (f'--out_dir={tmp_path}', f'--data_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=5')
    (tmp_path / 'letters').mkdir()
    meta = {'vocab_size': len(CHARS), 'itos': dict(enumerate(CHARS)), 'stoi': {c: i for i, c in enumerate(CHARS)}}
    (tmp_path / 'letters' / 'meta.pkl').write_bytes(pickle.dumps(meta))
    out, err = sample(*flags, '--start=hello')
    assert out.startswith('hello') and 'MHA' in err


def test_a_nanogpt_checkpoint_is_the_same_by_its_file(sample, tmp_path):
    nanogpt_checkpoint(tmp_path)
    (tmp_path / 'letters').mkdir()
    meta = {'vocab_size': len(CHARS), 'itos': dict(enumerate(CHARS)), 'stoi': {c: i for i, c in enumerate(CHARS)}}
    (tmp_path / 'letters' / 'meta.pkl').write_bytes(pickle.dumps(meta))
    flags = (f'--data_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=5', '--start=hello')
    assert sample(f'--init_from={tmp_path}/ckpt.pt', *flags)[0] == sample(f'--out_dir={tmp_path}', *flags)[0]


def test_a_published_model_without_a_tokenizer_is_sampled_as_ids(sample, tmp_path):
    save(tmp_path, GPT(GPTConfig(block_size=8, vocab_size=40, n_layer=1, n_head=1, n_embd=8)))
    sample(f'--source={tmp_path}', f'--out_dir={tmp_path}/hf', script='export_hf.py')
    flags = ('--start=5 9 5', '--num_samples=1', '--max_new_tokens=4')
    out, err = sample(f'--init_from={tmp_path}/hf', *flags)
    assert out.startswith('5 9 5 ') and len(out.split()) == 8 and 'stand for no text here' in err


class Anything:
    """A meta.pkl may hold no such thing."""


def test_nanogpt_pickle_runs_no_code(sample, tmp_path):
    nanogpt_checkpoint(tmp_path)
    (tmp_path / 'letters').mkdir()
    (tmp_path / 'letters' / 'meta.pkl').write_bytes(pickle.dumps(Anything()))
    with pytest.raises(UserError, match='Anything'):
        sample(f'--out_dir={tmp_path}', f'--data_dir={tmp_path}')


def test_gpt2_tokens_that_the_model_does_not_know(sample, tmp_path, monkeypatch):
    """A nanoGPT checkpoint of characters whose meta.pkl is not at hand is not taken for a GPT-2."""
    nanogpt_checkpoint(tmp_path)

    monkeypatch.setattr('core.text.tokenizer.GPT2Tokenizer.encode_array', lambda self, text: [])  # no download
    with pytest.raises(UserError, match='meta.pkl'):
        sample(f'--out_dir={tmp_path}', f'--data_dir={tmp_path}')


def test_from_the_shell(tmp_path):
    """The whole program once: exit codes, and a reader who leaves early."""
    save(tmp_path, GPT(GPTConfig(block_size=8, vocab_size=40, n_layer=1, n_head=1, n_embd=8)), tokenizer=META)
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    run = dict(cwd=ROOT, env=environment, capture_output=True, text=True, encoding='utf-8')
    wrong = subprocess.run([forking.interpreter(), 'sample.py', f'--out_dir={tmp_path}', '--start=h?'], **run)
    assert wrong.returncode == 2 and wrong.stdout == '' and 'Traceback' not in wrong.stderr
    assert wrong.stderr.splitlines()[-1].startswith("error: the character '?'")
    head = f'"{forking.interpreter()}" sample.py --out_dir="{tmp_path}" --max_new_tokens=300 | head -c 5'
    early = subprocess.run(head, shell=True, **run)
    assert len(early.stdout) == 5 and 'Traceback' not in early.stderr and 'BrokenPipe' not in early.stderr


def test_a_context_beyond_the_training_length(data_dir, tmp_path):
    """Without learned positions a model reads longer texts when asked; with them the limit is named."""
    from support.training import run as train

    for pos in ('rope', 'learned'):
        assert train('train.py', data_dir, tmp_path / pos, pos=pos, max_iters=1).returncode == 0
    keys = ['--device=cpu', '--num_samples=1', '--max_new_tokens=40', '--start=abc', '--temperature=0', '--context=64']
    longer = forking.run('sample.py', [f'--out_dir={tmp_path / "rope"}', *keys])
    assert longer.returncode == 0, longer.stderr
    window = forking.run('sample.py', [f'--out_dir={tmp_path / "rope"}', *keys[:-1]])
    assert window.returncode == 0 and window.stdout[:10] == longer.stdout[:10]
    refused = forking.run('sample.py', [f'--out_dir={tmp_path / "learned"}', *keys])
    assert (
        refused.returncode == 2
        and 'context=64 is too much: block_size=64 is more than the 16 learned' in refused.stderr
    )
    keys = dict(resume='yes', eval_only=True, block_size=40, eval_iters=1)
    assert 'val loss' in train('train.py', data_dir, tmp_path / 'rope', **keys).stdout
    stopped = train('train.py', data_dir, tmp_path / 'learned', **keys)
    assert stopped.returncode == 2 and 'block_size=40 cannot be applied' in stopped.stderr
