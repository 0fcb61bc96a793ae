"""Exported folders, loaded by transformers: the same logits, the same tokens, the latent cache."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from core import checkpoint as checkpoints
from core.runtime import UserError
from core.tokenizer import learn_bpe, load_tokenizer
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

ROOT = Path(__file__).resolve().parent.parent
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
    """Scripts run in the repository's root; transformers' copies of model code end with the test."""
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
    checkpoints.save(str(source), checkpoints.contents(model, {}, tokenizer=tokenizer))
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


@pytest.mark.parametrize('changes', [dict(), dict(bias=False, gelu='tanh')])
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
    assert kept * 4 == 3 * 24 * ours.init_cache(1).bytes_per_token  # the latent and nothing else


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
    right[0, 6:] = 0  # padded behind, as evaluation harnesses do to score
    assert (theirs(idx, attention_mask=right).logits[0, :6] - ours(idx, idx)[0][0, :6]).abs().max() < 1e-5


def test_what_is_loaded_can_be_trained_and_saved_again(monkeypatch, tmp_path):
    folder = export(monkeypatch, tmp_path, random_model('mla', **BOTH))
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).train()
    idx = torch.arange(11)[None]
    theirs(idx, labels=idx).loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())
    theirs.save_pretrained(tmp_path / 'again')
    again = AutoModelForCausalLM.from_pretrained(tmp_path / 'again', trust_remote_code=True)
    assert torch.equal(again.eval()(idx).logits, theirs.eval()(idx).logits)
    with pytest.raises(ValueError, match="25 tokens don't fit"):
        theirs(torch.zeros(1, 25, dtype=torch.long))


def same_tokens(folder, meta, texts):
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(meta)
    for text in texts:
        ids = theirs(text)['input_ids']
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    return theirs


def test_character_and_byte_tokenizers(monkeypatch, tmp_path):
    model = random_model('mha', vocab_size=256)
    tokenizer = same_tokens(export(monkeypatch, tmp_path, model), CHARS, ['abc\n\n  dead. \u00e9', ' a', '\n'])
    assert tokenizer.model_max_length == 24
    with pytest.raises(Exception, match='UNK|unk'):
        tokenizer('X')
    byte = {'tokenizer': 'byte'}
    folder = export(monkeypatch, tmp_path, model, byte, '--overwrite=True')
    same_tokens(folder, byte, ["It's  10 o'clock\n\t\u00e9\u4e2d\U0001f600", ''.join(map(chr, range(256)))])


def test_gpt2_tokenizer(monkeypatch, tmp_path, shared_data):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(shared_data / 'tiktoken_cache'))
    meta = {'tokenizer': 'gpt2'}
    model = random_model('mha', vocab_size=50304, n_embd=8)
    folder = export(monkeypatch, tmp_path, model, meta)
    text = (shared_data / 'tinyshakespeare' / 'input.txt').read_text()[:20000]
    tokenizer = same_tokens(folder, meta, [text, "  don't\n\n 1234 \u00e9\u4e2d\U0001f600 \t x", ''])
    assert tokenizer('<|endoftext|>')['input_ids'] == [50256] == [tokenizer.eos_token_id]
    assert len(tokenizer) == 50257
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 50256


def test_learned_byte_pair_tokenizer(monkeypatch, tmp_path):
    text = 'low lower lowest, newer newest; the lowest newest of them. ' * 20
    pieces = learn_bpe([text], 310)
    model = random_model('mla', vocab_size=len(pieces) + 1)
    folder = export(monkeypatch, tmp_path, model, {'tokenizer': 'bpe', 'pieces': pieces})
    tokenizer = same_tokens(folder, {'tokenizer': 'bpe', 'pieces': pieces}, [text, "don't\n\n 1 \u00e9\u4e2d\t x", ''])
    assert tokenizer('<|endoftext|>')['input_ids'] == [len(pieces)] == [tokenizer.eos_token_id]
    assert len(tokenizer) == len(pieces) + 1


def test_tokens_that_are_no_text_have_no_tokenizer(monkeypatch, tmp_path, capsys):
    folder = export(monkeypatch, tmp_path, random_model('mha'), {'tokenizer': 'none', 'vocab_size': 11})
    assert not list(Path(folder).glob('*tokenizer*'))
    assert 'no tokenizer' in capsys.readouterr().err


def test_what_cannot_be_exported_says_so(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="RoPE, which GPT-2 can't express"):
        export(monkeypatch, tmp_path, random_model('mha', pos='rope'))
    assert not (tmp_path / 'exported').exists()
    export(monkeypatch, tmp_path, random_model('mha'))
    before = {path.name: path.read_bytes() for path in (tmp_path / 'exported').iterdir()}
    with pytest.raises(UserError, match='is not empty'):
        export(monkeypatch, tmp_path, random_model('mla'))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'exported').iterdir()}
