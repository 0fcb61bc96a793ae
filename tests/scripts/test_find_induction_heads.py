"""find_induction_heads.py finds planted heads, writes its files and refuses models that were not trained."""

import base64
import hashlib
import json
import zlib

import numpy as np
import pytest
import torch
from support import forking
from support.planted import T, planted, randomized, save

from analysis.forward import untrained
from core.text import byte_pairs, tokenizer
from core.text.write_dataset import write_dataset
from model import GPT, GPTConfig

QUICK = ('--sequences=16', '--resamples=200', '--ablate_sequences=8', '--controls=1', '--device=cpu')


def find(*arguments):
    """The finished process of find_induction_heads.py."""
    return forking.run('find_induction_heads.py', (*arguments, *QUICK))


def page_of(folder):
    """The data of each model in patterns.html."""
    return json.loads((folder / 'patterns.html').read_text().split('const MODELS = ')[1].split(';\n')[0])


def trained(vocab_size):
    """A small model with all parameters random."""
    return randomized(GPT(GPTConfig(block_size=32, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=16)), 0.1)


def test_planted_heads_are_found_in_both_models(tmp_path):
    folders = [save(tmp_path / f'out-{kind}', planted(kind)) for kind in ('mha', 'mla')]
    out = tmp_path / 'found'
    done = find(f'--models={folders[0]},{folders[1]}', f'--out_dir={out}')
    assert done.returncode == 0, done.stderr
    for kind, folder in zip(('mha', 'mla'), folders, strict=True):
        digest = hashlib.sha256((folder / 'ckpt.pt').read_bytes()).hexdigest()
        assert f'out-{kind}: 1 of 4 heads are induction heads' in done.stdout
        line = next(line for line in done.stdout.splitlines() if str(folder / 'ckpt.pt') in line)
        assert 'iteration 40' in line and 'val loss 1.2500' in line and digest[:12] in line
    first = [line.split() for line in done.stdout.splitlines() if line.startswith('1.1')]
    assert [line[1] for line in first] == ['*', '*'] and all(float(line[2]) > 0.8 for line in first)
    found = json.loads((out / 'induction.json').read_text())['models']
    for model in found:
        assert np.array(model['called']).tolist() == [[False, False], [False, True]]
        assert model['ranking'][0] == [1, 1]
        assert model['random_null'] < 0.2 and len(model['token_losses']) == T - 1
    assert 'latent' in found[1] and 'latent' not in found[0]
    assert (out / 'induction_heads.png').read_bytes().startswith(b'\x89PNG')
    # the page embeds the patterns: head 1.1's last query attends to its match
    entry = page_of(out)[1]
    n = len(entry['sequences'][0]['tokens'])
    packed = np.frombuffer(zlib.decompress(base64.b64decode(entry['sequences'][0]['data'])), np.uint8).reshape(2, 2, -1)
    assert packed.shape[-1] == n * (n + 1) // 2
    assert packed[1, 1, (n - 1) * n // 2 + n // 2] == 255


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_what_is_attended_to_is_rounded_as_a_cache_would(kind, tmp_path):
    """The score of a planted head changes and stays high."""
    folder = save(tmp_path / f'out-{kind}', planted(kind))
    scores = {}
    for cache in ('float', 'int4'):
        out = tmp_path / cache
        done = find(f'--models={folder}', f'--out_dir={out}', f'--cache={cache}', '--ablate=False', '--html=False')
        assert done.returncode == 0, done.stderr
        scores[cache] = json.loads((out / 'induction.json').read_text())['models'][0]['induction']['mean'][1][1]
    assert scores['int4'] != scores['float'] and scores['int4'] > 0.5


def test_models_without_training_are_refused(tmp_path):
    cases = {
        'fresh': (save(tmp_path / 'fresh', untrained(planted('mla'), 11)), 'initial values'),
        'none': (tmp_path / 'nothing', 'no checkpoint'),
    }
    for folder, complaint in cases.values():
        done = find(f'--models={folder}', f'--out_dir={tmp_path / "found"}')
        assert done.returncode == 2 and complaint in done.stderr, done.stderr
        assert 'Traceback' not in done.stderr and done.stdout == ''
    assert find(f'--out_dir={tmp_path / "found"}').returncode == 2


@pytest.mark.slow
def test_a_sweep_shows_when_heads_form(tmp_path):
    folder = save(tmp_path / 'run', planted('mla'))
    (folder / 'ckpt.pt').rename(folder / 'ckpt_000040.pt')
    save(folder, planted('mla', sharpness=0.0), iter_num=10)
    out = tmp_path / 'found'
    done = find(f'--sweep={folder}', f'--out_dir={out}')
    assert done.returncode == 0, done.stderr
    steps = json.loads((out / 'formation.json').read_text())['runs'][0]['checkpoints']
    assert [step['iteration'] for step in steps] == [10, 40]
    assert steps[0]['induction']['mean'] < 0.2 < 0.8 < steps[1]['induction']['mean']
    assert steps[1]['induction']['head'] == [1, 1] and steps[1]['previous_token']['head'] == [0, 0]
    assert (out / 'formation.png').read_bytes().startswith(b'\x89PNG')
    assert not (out / 'induction.json').exists()


# ---- which tokens are drawn ------------------------------------------------------------------------------------------


def test_sequences_begin_with_the_end_token_of_a_learned_encoding(tmp_path):
    pieces = byte_pairs.learn_bpe(['some words, more words'], 260)
    meta = dict(tokenizer='bpe', vocab_size=260, pieces=pieces)
    folder, out = save(tmp_path / 'out-pairs', trained(260), tokenizer=meta), tmp_path / 'found'
    done = find(f'--models={folder}', f'--out_dir={out}', '--ablate=False')
    assert done.returncode == 0, done.stderr
    shown = page_of(out)[0]['sequences'][0]['tokens']
    assert shown[0] == '<bos>' and '<bos>' not in shown[1:] and len(shown) > 20


@pytest.mark.slow
def test_gpt2s_padding_is_not_drawn_and_its_end_token_comes_first(tmp_path):
    """As nanoGPT saves it: no tokenizer, GPT-2's ids padded to 50304. Without its vocabulary, ids are shown."""
    folder, out = save(tmp_path / 'nanogpt', trained(50304), tokenizer=None), tmp_path / 'found'
    done = find(f'--models={folder}', f'--out_dir={out}', '--ablate=False')
    assert done.returncode == 0, done.stderr
    shown = page_of(out)[0]['sequences'][0]['tokens']
    assert shown[0] == '<bos>' and all(int(token.removeprefix('#')) < 50256 for token in shown[1:])


@pytest.mark.slow
@pytest.mark.parametrize('present', [True, False])
def test_only_bytes_of_the_validation_text_are_drawn(tmp_path, present):
    """The other ids were never trained. Without the data, any byte can be drawn."""
    if present:
        ids = np.frombuffer(b'abcdefghijklmnopqrstuvwxyz' * 100, np.uint8)
        splits = {'train': ids, 'val': ids}
        write_dataset(tmp_path / 'data' / 'letters', tokenizer.ByteTokenizer(), splits, source='the alphabet')
    meta, config = dict(tokenizer='byte', vocab_size=256), {'dataset': 'letters'}
    folder, out = save(tmp_path / 'out-bytes', trained(256), tokenizer=meta, config=config), tmp_path / 'found'
    done = find(f'--models={folder}', f'--out_dir={out}', f'--data_dir={tmp_path / "data"}', '--ablate=False')
    assert done.returncode == 0, done.stderr
    random, *text = page_of(out)[0]['sequences']
    assert all(token.islower() and token.isascii() for token in random['tokens']) is present
    assert [''.join(entry['tokens'])[:5] for entry in text] == ['abcde'] * present
    context = json.loads((out / 'induction.json').read_text())['models'][0]['in_context']
    assert bool(context) is present


def test_published_weights_are_read_from_a_hugging_face_folder(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    randomized(model, 0.1).save_pretrained(tmp_path / 'published')
    done = find(f'--models={tmp_path / "published"}', f'--out_dir={tmp_path / "found"}', '--html=False')
    assert done.returncode == 0, done.stderr
    assert 'published: ' in done.stdout and 'published weights' in done.stdout
    assert not (tmp_path / 'found' / 'patterns.html').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    'sort, first, called', [('previous', '0.0', 'previous-token'), ('copying', '1.1', 'copying'), ('duplicate', '', '')]
)
def test_a_table_is_sorted_by_a_score_with_a_call_of_its_own(sort, first, called, tmp_path):
    folder = save(tmp_path / 'out', planted('mha'))
    done = find(f'--models={folder}', f'--out_dir={tmp_path}/found', f'--sort={sort}', '--ablate=False')
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line[:3] in ('0.0', '0.1', '1.0', '1.1')]
    assert len(rows) == 4 and done.stdout.count('columns:') == 1
    model = json.loads((tmp_path / 'found' / 'induction.json').read_text())['models'][0]
    if first:
        assert rows[0][0] == first and rows[0][1] == '*'
        assert f'heads are {called} heads' in done.stdout and '; the strongest scores' in done.stdout
    else:
        assert model['nulls']['duplicate_token'] > 0
        assert 'out: 0 of 4 heads are duplicate-token heads, 0 of them with twice' in done.stdout


@pytest.mark.slow
def test_heads_are_scored_and_drawn_on_a_text_of_ones_own(tmp_path):
    (tmp_path / 'in.txt').write_text('abcdef' * 40 + 'fedcba')
    letters = 'abcdefghijklmnopqrstuvwxyz'
    model = trained(27)
    meta = dict(tokenizer.CharTokenizer.learn(letters + '\n').meta())
    folder = save(tmp_path / 'out', model, tokenizer=meta)
    keys = (f'--models={folder}', f'--out_dir={tmp_path}/found', '--ablate=False')
    done = find(*keys, f'--text={tmp_path}/in.txt')
    assert done.returncode == 0, done.stderr
    assert f'on {tmp_path}/in.txt, 7 windows of 32 tokens, by induction:' in done.stdout
    found = json.loads((tmp_path / 'found' / 'induction.json').read_text())['models'][0]['text']
    assert found['windows'] == 7 and np.array(found['induction']['mean']).shape == (1, 2)
    assert 0 < found['induction']['chance'] < 0.3 and found['previous_token']['low'] <= found['previous_token']['mean']
    shown = page_of(tmp_path / 'found')[0]['sequences'][-1]
    assert shown['title'] == 'in.txt' and ''.join(shown['tokens'])[:12] == 'abcdefabcdef'
    for text, expected in (('ab', 'has 2 tokens'), (letters[:20], 'occurs twice'), ('a?' * 30, "'?'")):
        (tmp_path / 'in.txt').write_text(text)
        done = find(*keys, f'--text={tmp_path}/in.txt')
        assert done.returncode == 2 and expected in done.stderr.splitlines()[-1]
    (tmp_path / 'in.txt').write_bytes(b'\xff\xfe' * 40)
    done = find(*keys, f'--text={tmp_path}/in.txt')
    assert done.returncode == 2 and 'is not UTF-8' in done.stderr.splitlines()[-1]
    done = find(*keys, '--text=nowhere.txt')
    assert done.returncode == 2 and 'nowhere.txt is missing' in done.stderr.splitlines()[-1]
