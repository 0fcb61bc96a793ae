"""Exported folders, loaded by transformers and lm_eval: the same logits, the same tokens, the latent cache."""

import builtins
import errno
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, forking
from support.training import run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    dynamic_module_utils,
    pipeline,
)

from core.cli.errors import UserError
from core.convert import hf_tokenizer
from core.runs import checkpoint as checkpoints
from core.runs import models
from core.text.byte_pairs import learn_bpe
from core.text.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

SIZES = dict(block_size=24, vocab_size=11, n_layer=2, n_head=4, n_embd=32)
CHARS = {'tokenizer': 'char', 'chars': '\n abcdefg.\u00e9', 'vocab_size': 11}
BOTH = dict(pos='rope', n_latent=9, n_rope=4, n_latent_q=10, latent_norm=True)
VARIANTS = [
    dict(),
    dict(n_latent=6, bias=False, gelu='tanh'),
    dict(n_latent=30),
    BOTH,
    dict(pos='rope', n_latent=20, n_rope=2, bias=False),
]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """Scripts run in the repository's root; transformers' copies of the model code go to a temporary folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.setattr(dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path / 'modules'))
    monkeypatch.setattr(sys, 'path', list(sys.path))


def random_model(attention, **changes):
    torch.manual_seed(0)
    kind, config = {'mha': (GPT, GPTConfig), 'mla': (MLAGPT, MLAConfig)}[attention]
    model = kind(config(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def export(monkeypatch, tmp_path, model, tokenizer=CHARS, *flags):
    """Run export_hf.py on a checkpoint of the model; returns the folder."""
    source, folder = tmp_path / 'ckpt.pt', tmp_path / 'exported'
    checkpoints.save(str(source), models.contents(model, {}, tokenizer=tokenizer))
    monkeypatch.setattr(sys, 'argv', ['export_hf.py', f'--source={source}', f'--out_dir={folder}', *flags])
    runpy.run_path('export_hf.py', run_name='__main__')
    return str(folder)


@torch.no_grad()
def check_logits_and_generation(ours, theirs):
    idx = torch.randint(11, (3, 24), generator=torch.Generator().manual_seed(1))
    expected, _ = ours(idx, idx)
    assert (theirs(idx).logits - expected).abs().max() < 1e-5
    _, loss = ours(idx[:, :-1], idx[:, 1:].contiguous())
    assert theirs(idx, labels=idx).loss.item() == pytest.approx(loss.item(), abs=1e-5)
    prompt = idx[:, :5]
    greedy = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=19, do_sample=False)
    assert torch.equal(greedy, ours.generate(prompt, 19, temperature=0))
    return idx, expected


@pytest.mark.parametrize('changes', [dict(), dict(bias=False, gelu='tanh'), dict(n_kv_head=1)])
def test_mha_is_a_gpt2(monkeypatch, tmp_path, changes):
    ours = random_model('mha', **changes)
    folder = export(monkeypatch, tmp_path, ours)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == 'GPT2LMHeadModel'
    idx, expected = check_logits_and_generation(ours, theirs)
    back = GPT.from_pretrained(folder).eval()
    assert (back(idx, idx)[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize('changes', VARIANTS, ids=str)
def test_mla_with_its_own_code(monkeypatch, tmp_path, changes):
    ours = random_model('mla', **changes)
    folder = export(monkeypatch, tmp_path, ours)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values())
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    idx, expected = check_logits_and_generation(ours, theirs)
    with torch.no_grad():
        cache = None
        for start, end in ((0, 7), (7, 8), (8, 10), (10, 11), (11, 23), (23, 24)):
            out = theirs(idx[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            assert (out.logits - expected[:, start:end]).abs().max() < 1e-5
    kept = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kept * 4 == 3 * 24 * ours.init_cache(1).bytes_per_token  # latents and position keys only


@pytest.mark.parametrize('changes', [dict(n_latent=6), BOTH], ids=['learned', 'rope'])
@torch.no_grad()
def test_prompts_of_different_length_in_one_batch(monkeypatch, tmp_path, changes):
    ours = random_model('mla', **changes)
    folder = export(monkeypatch, tmp_path, ours)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    idx = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(idx)
    mask[1, :4] = 0
    out = theirs.generate(idx, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row, start in ((0, 0), (1, 4)):
        assert torch.equal(out[row, start:], ours.generate(idx[row : row + 1, start:], 8, temperature=0)[0])
    alone = ours(idx[1:, 4:], idx[1:, 4:])[0]
    assert (theirs(idx, attention_mask=mask).logits[1:, 4:] - alone).abs().max() < 1e-5
    right = torch.ones_like(idx)
    right[0, 6:] = 0  # right-padded, as evaluation harnesses do for scoring
    assert (theirs(idx, attention_mask=right).logits[0, :6] - ours(idx, idx)[0][0, :6]).abs().max() < 1e-5


def test_a_loaded_model_can_be_trained_and_saved_again(monkeypatch, tmp_path):
    folder = export(monkeypatch, tmp_path, random_model('mla', **BOTH))
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).train()
    idx = torch.arange(11)[None]
    theirs(idx, labels=idx).loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())
    theirs.save_pretrained(tmp_path / 'again')
    again = AutoModelForCausalLM.from_pretrained(tmp_path / 'again', trust_remote_code=True)
    assert torch.equal(again.eval()(idx).logits, theirs.eval()(idx).logits)
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert half(idx).logits.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="25 tokens don't fit"):
        theirs(torch.zeros(1, 25, dtype=torch.long))


def same_tokens(folder, meta, texts):
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(meta)
    for text in texts:
        ids = theirs(text)['input_ids']
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    return theirs


def check_special_token(folder, text, roles=('eos', 'pad', 'unk')):
    """One token of the model's vocabulary plays all roles, and only it is omitted from text."""
    tokenizer, config = AutoTokenizer.from_pretrained(folder), json.loads((Path(folder) / 'config.json').read_text())
    assert tokenizer.all_special_tokens == [text]
    for role in ('bos', 'eos', 'pad', 'unk'):
        assert getattr(tokenizer, f'{role}_token') == (text if role in roles else None)
    special_id = tokenizer.eos_token_id
    assert special_id < config['vocab_size'] and len(tokenizer) <= config['vocab_size']
    ids = [i for i in range(len(tokenizer)) if i != special_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    batch = tokenizer(['ab cd', 'a'], padding=True)
    assert batch['attention_mask'][0].count(0) == 0 and batch['attention_mask'][1][-2:] == [0, 1]
    assert batch['input_ids'][1][:-1] == [special_id] * (len(batch['input_ids'][0]) - 1)
    return tokenizer


def test_character_and_byte_tokenizers(monkeypatch, tmp_path):
    model = random_model('mha', vocab_size=256)
    folder = export(monkeypatch, tmp_path, model)
    tokenizer = same_tokens(folder, CHARS, ['abc\n\n  dead. \u00e9', ' a', '\n'])
    assert tokenizer.model_max_length == 24
    assert tokenizer('aXb\u4e2d')['input_ids'] == [2, 9, 3, 9]  # unknown characters
    check_special_token(folder, '.')
    byte = {'tokenizer': 'byte'}
    folder = export(monkeypatch, tmp_path, model, byte, '--overwrite=True')
    texts = ["It's  10 o'clock\n\t\u00e9\u4e2d\U0001f600", ''.join(map(chr, range(1000)))]
    same_tokens(folder, byte, texts)
    check_special_token(folder, '\0')


@pytest.mark.parametrize(
    ('chars', 'special'),
    [
        ("\n !$&',-.3:;?ABCxyz", '$'),
        ('\n abc\x1a$', '\x1a'),
        ('\n abc.!', '.'),
        (' abz', 'z'),
    ],
)
def test_special_token_of_characters_is_one_that_text_can_do_without(chars, special):
    tokenizer = load_tokenizer({'tokenizer': 'char', 'chars': chars})
    assert tokenizer.special_token == special
    assert tokenizer.fast_tokenizer().encode(chars[::-1]).ids == tokenizer.encode(chars[::-1])


@pytest.mark.slow
def test_gpt2_tokenizer(monkeypatch, tmp_path, shared_data):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(shared_data / 'tiktoken_cache'))
    meta = {'tokenizer': 'gpt2'}
    model = random_model('mha', vocab_size=50304, n_embd=8)
    folder = export(monkeypatch, tmp_path, model, meta)
    text = (shared_data / 'tinyshakespeare' / 'input.txt').read_text()[:20000]
    tokenizer = same_tokens(folder, meta, [text, "  don't\n\n 1234 \u00e9\u4e2d\U0001f600 \t x", ''])
    assert tokenizer('<|endoftext|>')['input_ids'] == [50256] == [tokenizer.eos_token_id]
    assert len(tokenizer) == 50257
    check_special_token(folder, '<|endoftext|>', roles=('bos', 'eos', 'pad', 'unk'))
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 50256


def test_learned_byte_pair_tokenizer(monkeypatch, tmp_path):
    text = 'low lower lowest, newer newest; the lowest newest of them. ' * 20
    pieces = learn_bpe([text], 310)
    model = random_model('mla', vocab_size=len(pieces) + 1)
    folder = export(monkeypatch, tmp_path, model, {'tokenizer': 'bpe', 'pieces': pieces})
    tokenizer = same_tokens(folder, {'tokenizer': 'bpe', 'pieces': pieces}, [text, "don't\n\n 1 \u00e9\u4e2d\t x", ''])
    assert tokenizer('<|endoftext|>')['input_ids'] == [len(pieces)] == [tokenizer.eos_token_id]
    assert len(tokenizer) == len(pieces) + 1
    check_special_token(folder, '<|endoftext|>', roles=('bos', 'eos', 'pad', 'unk'))


def test_the_tokenizers_class_is_one_that_transformers_4_knows(monkeypatch, tmp_path):
    """PreTrainedTokenizerFast; transformers 5 itself writes TokenizersBackend, which 4.57.6 refuses to load."""
    folder = export(monkeypatch, tmp_path, random_model('mha'))
    settings = json.loads((Path(folder) / 'tokenizer_config.json').read_text())
    assert settings['tokenizer_class'] == 'PreTrainedTokenizerFast'


def test_the_tokenizer_of_an_mla_model_loads_without_its_code(monkeypatch, tmp_path):
    folder = export(monkeypatch, tmp_path, random_model('mla'))
    questions = []

    def no_terminal(question):
        questions.append(question)
        raise EOFError

    monkeypatch.setattr(builtins, 'input', no_terminal)
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=False)('ab')['input_ids'] == [2, 3]
    assert not questions
    assert AutoTokenizer.from_pretrained(folder)('ab')['input_ids'] == [2, 3]  # asks, and does without an answer


# ---- evaluation harnesses and pipelines ------------------------------------------------------------------------------
PIECES = learn_bpe(['low lower lowest, newer newest; the lowest newest of them. '] * 20, 290)
EXPORTS = {
    'char mha': ('mha', CHARS),
    'char mla': ('mla', CHARS),
    'byte mla': ('mla', {'tokenizer': 'byte'}),
    'bpe mla': ('mla', {'tokenizer': 'bpe', 'pieces': PIECES}),
}
CONTEXTS = ['abc\nde', 'a', 'gfed cba.', '\n\nb a']
exports = pytest.mark.parametrize('name', EXPORTS)


def exported(monkeypatch, tmp_path, name):
    """The training model, its tokenizer, and the folder."""
    attention, meta = EXPORTS[name]
    tokenizer = load_tokenizer(meta)
    ours = random_model(attention, vocab_size=tokenizer.n_vocab, **(BOTH if attention == 'mla' else {}))
    return ours, tokenizer, export(monkeypatch, tmp_path, ours, meta)


def expected_text(ours, tokenizer, context, until, new=12):
    """The training model's greedy continuation up to the first of the strings `until`."""
    ids = torch.tensor([tokenizer.encode(context, special=True)])
    text = tokenizer.decode(ours.generate(ids, new, temperature=0)[0, ids.size(1) :])
    return min((text.split(stop)[0] for stop in until), key=len)


def stops(ours, tokenizer):
    """A string that occurs in the first continuation, one that doesn't, and the special token."""
    return [expected_text(ours, tokenizer, CONTEXTS[0], ['no such text'])[5:7], '#', tokenizer.special_token]


def expected_log_likelihood(ours, tokenizer, context, continuation):
    """The sum of the log-probabilities of the continuation's tokens. context: ids."""
    ids = torch.tensor([[*context, *tokenizer.encode(continuation)]])
    log_probs = ours(ids, ids)[0][0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return log_probs[len(context) - 1 :].sum().item()


class Stop(StoppingCriteria):
    """As lm_eval's MultiTokenEOSCriteria: true once every row contains the stop sequence."""

    def __init__(self, sequence, tokenizer, start):
        self.sequence, self.tokenizer, self.start = sequence, tokenizer, start
        self.lookback = len(tokenizer.encode(sequence, add_special_tokens=False)) + 2
        self.done = None  # of each row

    def __call__(self, input_ids, scores, **kwargs):
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -self.lookback :])
        found = [self.sequence in text for text in texts]
        self.done = [a or b for a, b in zip(self.done or found, found, strict=True)]
        return all(self.done)


@pytest.mark.slow
@exports
@torch.no_grad()
def test_a_harness_generates_and_scores_as_lm_eval_does(monkeypatch, tmp_path, name):
    """What lm_eval's HFLM asks of tokenizer and model, without lm_eval."""
    ours, our_tokenizer, folder = exported(monkeypatch, tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    until = stops(ours, our_tokenizer)
    assert tokenizer.decode(tokenizer.eos_token_id, skip_special_tokens=False) == until[-1]
    for contexts in (CONTEXTS, *([context] for context in CONTEXTS)):
        batch = tokenizer(contexts, padding='longest', return_tensors='pt')
        width = batch['input_ids'].size(1)
        criteria = StoppingCriteriaList([Stop(sequence, tokenizer, width) for sequence in until])
        out = model.generate(**batch, max_length=width + 12, do_sample=False, use_cache=True,
                             stopping_criteria=criteria, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        for context, ids in zip(contexts, out[:, width:].tolist(), strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            whole = tokenizer.decode(ids)
            assert text == whole.replace(until[-1], '')
            generated = min((whole.split(stop)[0] for stop in until), key=len)
            assert generated == expected_text(ours, our_tokenizer, context, until)
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    texts = ['abcd', 'a\n', 'dead beef']
    rows = [torch.tensor([prefix, *tokenizer.encode(text)]) for text in texts]
    right_padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # and no mask, as in lm_eval
    log_probs = model(right_padded).logits.log_softmax(-1)
    for row, ids, text in zip(log_probs, rows, texts, strict=True):
        score = row[: len(ids) - 1].gather(1, ids[1:, None]).sum().item()
        assert score == pytest.approx(expected_log_likelihood(ours, our_tokenizer, [prefix], text), abs=1e-4)


@exports
@torch.no_grad()
def test_a_pipeline_keeps_the_lines(monkeypatch, tmp_path, name):
    ours, our_tokenizer, folder = exported(monkeypatch, tmp_path, name)
    generator = pipeline('text-generation', folder, trust_remote_code=True)
    out = generator(CONTEXTS, max_new_tokens=12, do_sample=False, batch_size=4, return_full_text=False)
    for context, (result,) in zip(CONTEXTS, out, strict=True):
        text = expected_text(ours, our_tokenizer, context, ['no such text'])
        if our_tokenizer.end_of_text is not None:
            text = text.split(our_tokenizer.special_token)[0]
        assert result['generated_text'] == text.replace(our_tokenizer.special_token, '')


@pytest.mark.parametrize('attention', ['mha', 'mla'])
def test_a_pipeline_and_generate_without_settings_stop_at_the_models_length(monkeypatch, tmp_path, attention):
    folder = export(monkeypatch, tmp_path, random_model(attention))
    torch.manual_seed(0)
    generator = pipeline('text-generation', folder, trust_remote_code=True)
    assert generator('abc')[0]['generated_text'].startswith('abc')
    assert len(generator('abc', return_tensors=True)[0]['generated_token_ids']) == 24
    assert generator.model.generate(torch.tensor([[2, 3]])).shape == (1, 24)


@exports
@torch.no_grad()
def test_lm_eval(monkeypatch, tmp_path, name):
    """loglikelihood, loglikelihood_rolling and generate_until of EleutherAI's harness, where it is installed."""
    huggingface = pytest.importorskip('lm_eval.models.huggingface', exc_type=ImportError)
    from lm_eval.api.instance import Instance

    ours, tokenizer, folder = exported(monkeypatch, tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    until = stops(ours, tokenizer)
    prefix = theirs.eos_token_id
    for batch_size in (1, 4):
        harness = huggingface.HFLM(model, tokenizer=theirs, batch_size=batch_size, max_length=24)

        def ask(kind, arguments, harness=harness):
            return getattr(harness, kind)([Instance(kind, {}, args, i) for i, args in enumerate(arguments)])

        asked = [(context, {'until': until[:2], 'max_gen_toks': 12, 'do_sample': False}) for context in CONTEXTS]
        assert ask('generate_until', asked) == [expected_text(ours, tokenizer, text, until) for text in CONTEXTS]
        for (score, _), context in zip(ask('loglikelihood', [(c, 'dead') for c in CONTEXTS]), CONTEXTS, strict=True):
            ids = tokenizer.encode(context)
            assert score == pytest.approx(expected_log_likelihood(ours, tokenizer, ids, 'dead'), abs=1e-4)
        for score, text in zip(ask('loglikelihood_rolling', [(c,) for c in CONTEXTS]), CONTEXTS, strict=True):
            assert score == pytest.approx(expected_log_likelihood(ours, tokenizer, [prefix], text), abs=1e-4)


def test_ids_that_stand_for_no_text_have_no_tokenizer(monkeypatch, tmp_path, capsys):
    folder = export(monkeypatch, tmp_path, random_model('mha'), {'tokenizer': 'none', 'vocab_size': 11})
    assert not list(Path(folder).glob('*tokenizer*'))
    assert 'no tokenizer' in capsys.readouterr().err


# ---- writing over an older export ------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize('failing', ['safetensors.torch.save_file', 'core.convert.hf_tokenizer.write'])
def test_a_full_disk_leaves_the_export_that_was_there(monkeypatch, tmp_path, failing):
    folder = export(monkeypatch, tmp_path, random_model('mha'))
    before = contents(folder)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patched:
        patched.setattr(failing, full)
        with pytest.raises(UserError, match="can't be written .*No space left on device.*what was there is unchanged"):
            export(monkeypatch, tmp_path, random_model('mla', n_embd=16), CHARS, '--overwrite=True')
        assert contents(folder) == before
        shutil.rmtree(folder)
        with pytest.raises(UserError, match="can't be written"):
            export(monkeypatch, tmp_path, random_model('mha'))
        assert not Path(folder).exists()


def test_a_folder_in_the_way_of_a_file_leaves_what_was_there(monkeypatch, tmp_path):
    folder = Path(export(monkeypatch, tmp_path, random_model('mha')))
    (folder / 'config.json').unlink()
    (folder / 'config.json').mkdir()
    (folder / 'README.md').write_text('mine')
    with pytest.raises(UserError, match='config.json is a folder.*what was there is unchanged'):
        export(monkeypatch, tmp_path, random_model('mla', n_embd=16), CHARS, '--overwrite=True')
    assert (folder / 'README.md').read_text() == 'mine' and not (folder / '.writing').exists()


def test_an_export_over_another_removes_what_no_longer_applies_and_nothing_else(monkeypatch, tmp_path):
    folder = Path(export(monkeypatch, tmp_path, random_model('mla')))
    (folder / 'notes.txt').write_text('mine')
    (folder / 'onnx').mkdir()
    (folder / '.writing').mkdir()  # of an export that was killed
    (folder / '.writing' / 'model.safetensors').write_text('half')
    export(monkeypatch, tmp_path, random_model('mha'), {'tokenizer': 'none', 'vocab_size': 11}, '--overwrite=True')
    own = {'README.md', 'config.json', 'generation_config.json', 'model.safetensors'}
    assert {path.name for path in folder.iterdir()} == own | {'notes.txt', 'onnx'}
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == 'GPT2LMHeadModel'


# ---- an exported folder as a source ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_exported_folder_is_trained_on_its_own_tokens_alone(monkeypatch, data_dir, tmp_path):
    """It used to count as one of GPT-2's 50,257 tokens."""
    assert run('train.py', data_dir, tmp_path / 'out', max_iters=1).returncode == 0
    for name in ('hf', 'hf-other'):
        done = forking.run('export_hf.py', [f'--source={tmp_path}/out', f'--out_dir={tmp_path}/{name}'])
        assert done.returncode == 0, done.stderr
    meta = checkpoints.load(str(tmp_path / 'out'))['tokenizer']
    assert models.pretrained(str(tmp_path / 'hf'))[1]['tokenizer'] == load_tokenizer(meta).meta()
    done = run('train.py', data_dir, tmp_path / 'tuned', max_iters=1, bias=True, init_from=str(tmp_path / 'hf'))
    assert done.returncode == 0, done.stderr
    chars = ''.join(map(chr, range(200, 200 + meta['vocab_size'])))
    other = load_tokenizer({'tokenizer': 'char', 'chars': chars})
    hf_tokenizer.write(str(tmp_path / 'hf-other'), other, 16)
    keys = dict(max_iters=1, bias=True, init_from=str(tmp_path / 'hf-other'))
    done = run('train.py', data_dir, tmp_path / 'refused', **keys)
    assert done.returncode == 2 and f'was trained on char tokens ({len(chars)} ids)' in done.stderr


def test_models_that_cannot_be_exported_are_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match='GPT2LMHeadModel no pos=rope'):
        export(monkeypatch, tmp_path, random_model('mha', pos='rope'))
    for attention, key, value in (('mha', 'norm', 'rms'), ('mla', 'mlp', 'swiglu'), ('mla', 'n_hidden', 64)):
        with pytest.raises(UserError, match=f'no class has such a model: .* no {key}={value}'):
            export(monkeypatch, tmp_path, random_model(attention, **{key: value}))
    assert not (tmp_path / 'exported').exists()
    export(monkeypatch, tmp_path, random_model('mha'))
    before = {path.name: path.read_bytes() for path in (tmp_path / 'exported').iterdir()}
    with pytest.raises(UserError, match='is not empty'):
        export(monkeypatch, tmp_path, random_model('mla'))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'exported').iterdir()}


def test_the_model_card_says_what_it_is_and_how_it_was_made(data_dir, tmp_path):
    keys = dict(max_iters=2, n_latent=9, learning_rate=3e-3)
    assert run('train_mla.py', data_dir, tmp_path / 'out', **keys).returncode == 0
    done = forking.run('export_hf.py', [f'--source={tmp_path}/out', f'--out_dir={tmp_path}/hf'])
    assert done.returncode == 0, done.stderr
    card = (tmp_path / 'hf' / 'README.md').read_text()
    saved = checkpoints.load(str(tmp_path / 'out'))
    assert card.startswith('---\nlibrary_name: transformers\n') and '# A GPT with MLA, r=9' in card
    assert f'2 iterations on a test, validation loss {saved["val_loss"]:.4f} nats per token' in card
    assert f'{sum(p.numel() for p in models.build_model(saved).parameters()):,} parameters' in card
    command = next(line for line in card.splitlines() if line.startswith('python train_mla.py'))
    assert {'--n_latent=9', '--learning_rate=0.003', '--dataset=tiny', '--block_size=16'} <= set(command.split())
    assert str(tmp_path) not in card  # nothing of this machine
    assert 'transformers >= 5.1' in card and 'LoRA' in card and 'max_gen_toks' in card
