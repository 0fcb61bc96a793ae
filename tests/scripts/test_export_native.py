"""export_hf.py where a class of transformers' own can express the model: no code, and everything goes back in."""

import json

import pytest
import torch
from support import ROOT, forking
from support.native import IDX, our_deepseek, our_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import models
from core.text.byte_pairs import learn_bpe
from core.text.tokenizer import BPETokenizer, CharTokenizer

CHARS = CharTokenizer("\n $abcdefghijklmnopqrstuvwxyz.,;:!?\u00e9-'")
BPE = BPETokenizer(learn_bpe(['the thing that they think is there, and a banana is a banana'] * 3, 280))
MODELS = {
    'Llama': (LlamaForCausalLM, lambda: our_llama(n_head=6, n_kv_head=2, n_embd=60, rope_theta=500.0), CHARS),
    'Llama, untied': (LlamaForCausalLM, lambda: our_llama(tied=False, vocab_size=BPE.n_vocab), BPE),
    'DeepSeek': (DeepseekV3ForCausalLM, lambda: our_deepseek(), CHARS),
    'DeepSeek, untied': (DeepseekV3ForCausalLM, lambda: our_deepseek(tied=False, n_latent_q=13), CHARS),
    'GPT-2 with its own hidden size, untied': (
        GPT2LMHeadModel,
        lambda: our_llama(norm='layer', mlp='gelu', pos='learned', tied=False),
        CHARS,
    ),
}  # fmt: skip


@pytest.fixture
def export(prepare, monkeypatch, tmp_path):
    """Runs export_hf.py on a checkpoint of a model: (the folder, what it told)."""

    def exported(model, tokenizer, **keys):
        monkeypatch.chdir(ROOT)
        source, folder = str(tmp_path / 'ckpt.pt'), str(tmp_path / 'exported')
        checkpoints.save(source, models.contents(model, {}, tokenizer=tokenizer.meta() if tokenizer else {}))
        told = prepare('export_hf.py', **{'source': source, 'out_dir': folder, **keys}).err.splitlines()
        return folder, [line for line in told if not line.startswith('command line sets')]

    return exported


@pytest.mark.parametrize('name', MODELS)
def test_the_folder_opens_without_code_and_is_the_model_again(name, export):
    theirs_class, make, tokenizer = MODELS[name]
    model = make()
    folder, told = export(model, tokenizer)
    assert told == []
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert type(theirs) is theirs_class
    ids = IDX % tokenizer.n_vocab
    with torch.no_grad():
        expected = model(ids, ids)[0]
        assert (theirs.eval()(ids).logits - expected).abs().max() < 1e-5
    text = 'the banana'
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(text)['input_ids'] == tokenizer.encode(text)
    again, saved = models.pretrained(folder)
    assert saved['tokenizer'] == tokenizer.meta()
    with torch.no_grad():
        assert (again.eval()(ids, ids)[0] - expected).abs().max() < 1e-6


@pytest.mark.parametrize('changes, named', [
    (dict(latent_norm=False, norm='layer', mlp='gelu', n_hidden=0), 'norm=layer'),
], ids=str)  # fmt: skip
def test_the_setting_that_prevents_the_native_class_is_named(changes, named, export):
    folder, told = export(our_deepseek(**changes), CHARS)
    assert told == [f'the model comes with its own code, because DeepseekV3ForCausalLM has no {named}']
    assert json.loads(open(f'{folder}/config.json').read())['model_type'] == 'mla_gpt'


@pytest.mark.parametrize('model, message', [
    (lambda: our_llama(n_rope=4), 'LlamaForCausalLM no n_rope=4, and GPT2LMHeadModel no norm=rms'),
    (lambda: our_llama(norm='layer'), 'LlamaForCausalLM no norm=layer, and GPT2LMHeadModel no mlp=swiglu'),
])  # fmt: skip
def test_a_model_that_no_class_has_is_refused_and_no_folder_made(model, message, export, tmp_path):
    with pytest.raises(UserError, match=message):
        export(model(), CHARS)
    assert not (tmp_path / 'exported').exists()


def test_gguf_is_one_file_that_opens_here(export):
    model = our_llama()
    folder, told = export(model, CHARS, format='gguf')
    assert told == []
    again, saved = models.pretrained(f'{folder}/model.gguf')
    assert saved['tokenizer'] == CHARS.meta() and again.config == model.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize('model, named', [(our_deepseek, 'attention=mla'), (lambda: our_llama(bias=True), 'bias=True')])
def test_a_gguf_file_of_another_form_is_refused(model, named, export, tmp_path):
    with pytest.raises(UserError, match=f'this one has {named}; use --format=hf'):
        export(model(), CHARS, format='gguf')
    assert not (tmp_path / 'exported').exists()


def test_a_published_model_can_be_exported_again(export, prepare, tmp_path):
    model = our_llama()
    folder, _ = export(model, CHARS, format='gguf')
    out = str(tmp_path / 'again')
    prepare('export_hf.py', source=f'{folder}/model.gguf', out_dir=out)
    again, saved = models.pretrained(out)
    assert saved['tokenizer'] == CHARS.meta()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_folder_with_a_tokenizer_that_is_none_of_ours_gives_ids(export):
    folder, told = export(our_llama(), None)
    assert len(told) == 1 and 'has no tokenizer for text' in told[0]
    keys = [f'--init_from={folder}', '--start=1 2 36', '--num_samples=1', '--max_new_tokens=4', '--temperature=0']
    done = forking.run('sample.py', keys)
    expected = models.pretrained(folder)[0].eval().generate(torch.tensor([[1, 2, 36]]), 4, temperature=0)
    assert done.stdout.split('\n')[0].split() == [str(i) for i in expected[0].tolist()]
    assert 'prompt and samples are ids' in done.stderr
    done = forking.run('sample.py', [f'--init_from={folder}', '--start=1 37'])
    assert done.returncode == 2 and "'37' is no id" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('make', [our_llama, our_deepseek], ids=['Llama', 'DeepSeek'])
def test_scripts_take_the_folder(make, export, data_dir, tmp_path):
    """sample.py continues a text, and train.py starts from the model, with its own tokenizer."""
    chars = CharTokenizer('abcdefghijkl')
    folder, _ = export(make(vocab_size=12), chars)
    done = forking.run('sample.py', [f'--init_from={folder}', '--start=abc', '--num_samples=1', '--max_new_tokens=5'])
    assert done.stdout.startswith('abc') and len(done.stdout.split('\n')[0]) == 8, done.stderr
    script = 'train.py' if make is our_llama else 'train_mla.py'
    where = [f'--data_dir={data_dir}', '--dataset=tiny', f'--out_dir={tmp_path}/out', '--device=cpu']
    keys = ['--max_iters=2', '--eval_iters=2', '--batch_size=2', '--gradient_accumulation_steps=1', '--wandb_log=False']
    done = forking.run(script, [f'--init_from={folder}', *where, *keys, '--learning_rate=1e-9', '--min_lr=0'])
    assert done.returncode == 0, done.stderr
    trained = checkpoints.load(f'{tmp_path}/out')
    before, _ = models.pretrained(folder)
    after = models.build_model(trained)
    assert after.config == before.config
    worst = max((t - after.state_dict()[n]).abs().max() for n, t in before.state_dict().items())
    assert 0 < worst < 1e-6
