"""data/hub/prepare.py: what is written, in one file or several, where a stopped run goes on, and what is refused."""

import gzip
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from support import forking
from support.preparing import ROOT, files_of, ids_of
from support.training import assert_same_run, run

from core.cli.errors import UserError
from core.cli.files import sha256
from core.text.dataset import TokenData
from core.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

datasets = pytest.importorskip('datasets')
HUB = 'data/hub/prepare.py'
# 1.1 MB, in five tasks of the encoder; document 7 is empty, and 8 is long enough to be encoded in pieces
DOCUMENTS = [f'Page {i}: {"some words " * (i % 60)}\n\nand <|endoftext|> of page {i * i}.' for i in range(3000)]
DOCUMENTS[7:9] = ['', 'a long one ' * 40000]
KEYS = dict(val_fraction=0.05, tokenizer='byte', workers=1)


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A folder with two Parquet files of DOCUMENTS, in three row groups, and a column that is not read."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    folder = tmp_path / 'pages'
    folder.mkdir()
    for name, part in (('0.parquet', DOCUMENTS[:1300]), ('1.parquet', DOCUMENTS[1300:])):
        table = pyarrow.table({'id': list(range(len(part))), 'text': part})
        pyarrow.parquet.write_table(table, folder / name, row_group_size=900)
    return folder


def divided(out_dir, tokenizer, fraction=0.05, seed=1337):
    """{split: ids}: each document encoded by itself, in order, and divided by the rule that the page states."""
    encoder, ids = load_tokenizer(json.loads((out_dir / 'meta.json').read_text())), {'train': [], 'val': []}
    assert encoder.name == tokenizer
    for text in filter(None, DOCUMENTS):
        digest = hashlib.sha256(f'{seed} split {text}'.encode()).digest()
        split = 'val' if int.from_bytes(digest[:8], 'big') / 2**64 < fraction else 'train'
        ids[split] += [*encoder.encode(text), *([encoder.end_of_text] if encoder.end_of_text else [])]
    return ids


@pytest.mark.parametrize('tokenizer', ['gpt2', 'bpe', 'byte'])
def test_documents_are_encoded_one_by_one(tokenizer, prepare, pages, gpt2_cache, tmp_path):
    more = dict(vocab_size=400) if tokenizer == 'bpe' else {}
    out, _ = prepare(HUB, input=pages, out_dir=tmp_path / 'out', **{**KEYS, 'tokenizer': tokenizer, **more})
    expected = divided(tmp_path / 'out', tokenizer)
    for split, ids in expected.items():
        assert ids_of(tmp_path / 'out', split).tolist() == ids
    assert 0.02 < len(expected['val']) / len(expected['train']) < 0.1
    data = TokenData(tmp_path / 'out', 64)
    assert data.corpus == '2,999 documents of pages' and data.meta['documents'] == 2999
    assert set(files_of(tmp_path / 'out')) == {'train.bin', 'val.bin', 'meta.json'} and 'tokens/s' in out


def test_json_lines_are_the_same_documents(prepare, pages, tmp_path):
    lines = ''.join(json.dumps({'content': text, 'n': 1}) + '\n' for text in DOCUMENTS)
    (tmp_path / 'pages.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    prepare(HUB, input=pages, out_dir=tmp_path / 'a', **KEYS)
    prepare(HUB, input=tmp_path / 'pages.jsonl.gz', column='content', out_dir=tmp_path / 'b', **KEYS)
    for split in ('train', 'val'):
        assert np.array_equal(ids_of(tmp_path / 'a', split), ids_of(tmp_path / 'b', split))


def test_several_files_are_the_single_file(prepare, pages, tmp_path):
    prepare(HUB, input=pages, out_dir=tmp_path / 'one', **KEYS)
    prepare(HUB, input=pages, out_dir=tmp_path / 'some', shard_tokens=300_000, **KEYS)
    shards = sorted((tmp_path / 'some').glob('train*.bin'))
    assert [path.name for path in shards] == [f'train_{n:05d}.bin' for n in range(len(shards))] and len(shards) > 3
    assert b''.join(path.read_bytes() for path in shards) == (tmp_path / 'one' / 'train.bin').read_bytes()
    assert all(path.stat().st_size == 600_000 for path in shards[:-1])
    one, some = (json.loads((tmp_path / name / 'meta.json').read_text()) for name in ('one', 'some'))
    assert some.pop('shards') == [path.stat().st_size // 2 for path in shards]
    assert some['sha256'] == {path.name: sha256(path) for path in (*shards, tmp_path / 'some' / 'val.bin')}
    assert {**one, 'sha256': 0} == {**some, 'sha256': 0}
    # back to one file: nothing of the old files stays
    prepare(HUB, input=pages, out_dir=tmp_path / 'some', **KEYS)
    assert files_of(tmp_path / 'some') == files_of(tmp_path / 'one')


def test_it_stops_after_so_many_tokens(prepare, pages, tmp_path):
    prepare(HUB, input=pages, out_dir=tmp_path / 'all', **KEYS)
    prepare(HUB, input=pages, out_dir=tmp_path / 'out', tokens='6e5', **KEYS)
    whole, part = ({split: ids_of(tmp_path / name, split) for split in ('train', 'val')} for name in ('all', 'out'))
    assert len(part['train']) == 600_000 < len(whole['train']) and 0 < len(part['val']) < len(whole['val'])
    for split, ids in part.items():
        assert np.array_equal(ids, whole[split][: len(ids)])
    # the validation documents are those before the last training document
    documents = json.loads((tmp_path / 'out' / 'meta.json').read_text())['documents']
    read = sum(len(text) for text in [text for text in DOCUMENTS if text][:documents])
    assert sum(map(len, part.values())) <= read <= sum(map(len, part.values())) + 1000


# ---- stopped runs ----------------------------------------------------------------------------------------------------

STOPPED = """
import os, runpy, signal
replace, calls = os.replace, []
def stopped(source, target):
    calls.append(str(target))
    if sum(call.endswith('progress.json') for call in calls) == {number}:
        os.kill(os.getpid(), signal.{signal})
    replace(source, target)
os.replace = stopped
runpy.run_path({script!r}, run_name='__main__')
"""


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='there is no kill -9 here')
@pytest.mark.parametrize(('tokenizer', 'how', 'number'), [('byte', 'SIGKILL', 3), ('bpe', 'SIGTERM', 2)])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tokenizer, how, number, prepare, pages, tmp_path):
    keys = {**KEYS, 'input': pages, 'shard_tokens': 100_000, 'tokenizer': tokenizer}
    out_dir = tmp_path / 'stopped'
    arguments = [f'--{key}={value}' for key, value in {**keys, 'out_dir': out_dir}.items()]
    program = STOPPED.format(script=str(ROOT / HUB), number=number, signal=how)
    done = forking.run('-c', [program, *arguments])
    assert done.returncode == (-signal.SIGKILL if how == 'SIGKILL' else 143), done.stderr
    assert 'Traceback' not in done.stderr and 'Exception ignored' not in done.stderr
    before = json.loads((out_dir / 'progress.json').read_text())
    with open(max(out_dir.glob('train_*.part')), 'ab') as file:
        file.write(b'half a document')
    _, err = prepare(HUB, **keys, out_dir=out_dir)
    assert f'resuming after {before["documents"]:,} documents' in err and before['documents'] > 200
    prepare(HUB, **keys, out_dir=tmp_path / 'whole')
    stopped, whole = files_of(out_dir), files_of(tmp_path / 'whole')
    stopped.pop('progress.json.writing', None)
    assert stopped == whole and len(whole) > 5


def test_a_run_that_failed_at_its_end_reads_nothing_again(prepare, pages, tmp_path, monkeypatch):
    from core.text import write_dataset

    def full(*_):
        raise OSError(28, 'No space left on device')

    prepare(HUB, input=pages, out_dir=tmp_path / 'whole', **KEYS)
    with monkeypatch.context() as patch:
        patch.setattr(write_dataset, 'publish', full)
        with pytest.raises(UserError, match='No space left'):
            prepare(HUB, input=pages, out_dir=tmp_path / 'out', **KEYS)
    monkeypatch.setattr(datasets.IterableDataset, 'iter', full)
    prepare(HUB, input=pages, out_dir=tmp_path / 'out', **KEYS)
    left = files_of(tmp_path / 'out')
    del left['.lock']  # of the failed run, which was in this process: until that ends
    assert left == files_of(tmp_path / 'whole')


def test_what_does_not_belong_to_this_run_is_not_continued(prepare, pages, tmp_path):
    prepare(HUB, input=pages, out_dir=tmp_path / 'whole', **KEYS)
    out = tmp_path / 'out'
    for content, message in (('{"of": {}}', 'other documents or settings'), ('{', 'progress.json is broken'),
                             ('[]', 'is broken')):  # fmt: skip
        out.mkdir(exist_ok=True)
        (out / 'train_00000.bin.part').write_bytes(b'old')
        (out / 'train_00007.bin.part').write_bytes(b'old')
        (out / 'progress.json').write_text(content)
        _, err = prepare(HUB, input=pages, out_dir=out, **KEYS)
        assert message in err and files_of(out) == files_of(tmp_path / 'whole')


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def test_the_commit_of_the_hub_stays_when_a_stopped_run_goes_on(prepare, pages, tmp_path, monkeypatch):
    import huggingface_hub

    load, asked, heads = datasets.load_dataset, [], ['c0ffee', 'moved']

    def from_hub(path, subset, split, revision, streaming):
        asked.append((path, subset, split, revision, streaming))
        return load('parquet', data_files=[str(path) for path in sorted(pages.iterdir())], split=split, streaming=True)

    monkeypatch.setattr(datasets, 'load_dataset', from_hub)
    monkeypatch.setattr(huggingface_hub, 'HfApi', lambda: SimpleNamespace(
        dataset_info=lambda hub, revision: SimpleNamespace(sha=heads.pop(0))))  # fmt: skip
    keys = dict(hub='owner/pages', subset='small', out_dir=tmp_path / 'out', **KEYS)
    for key in ('val_fraction', 'val_fraction'):
        with pytest.raises(UserError, match='none of 2,999 documents'):
            prepare(HUB, **{**keys, key: 1e-9})
    assert asked == [('owner/pages', 'small', 'train', 'c0ffee', True)] * 2 and heads == ['moved']
    prepare(HUB, **keys)
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text())
    assert meta['source'] == '2,999 documents of owner/pages (small)'
    assert (meta['hub'], meta['subset'], meta['split'], meta['revision']) == ('owner/pages', 'small', 'train', 'moved')


def test_without_a_network_it_says_so_at_once():
    begun = time.monotonic()
    done = forking.run(HUB, ['--hub=owner/pages', '--tokenizer=byte'])
    assert done.returncode == 2 and time.monotonic() - begun < 100
    assert done.stderr.splitlines()[-1].startswith("error: can't read owner/pages: ")
    assert not (ROOT / 'data' / 'pages').exists()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_bad_input_gets_one_line(prepare, pages, tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / 'broken.parquet').write_bytes(b'PAR1')
    (tmp_path / 'empty.jsonl').write_text('')
    (tmp_path / 'a.txt').write_text('text')
    pyarrow.parquet.write_table(pyarrow.table({'text': [[1], [2]]}), tmp_path / 'lists.parquet')
    for keys, message in (
        (dict(), 'either --hub=OWNER/NAME'),
        (dict(input=pages, hub='a/b'), 'either --hub=OWNER/NAME'),
        (dict(input=pages, split='test'), '--split and --revision choose from a data set of the Hub'),
        (dict(input=pages, tokenizer='char'), 'choose byte or bpe'),
        (dict(input=pages, shard_tokens=64), 'shard_tokens is 64'),
        (dict(input=pages, column='body'), "no column 'body', only id, text; choose one with --column"),
        (dict(input=pages, column='id'), 'other values than text'),
        (dict(input=tmp_path / 'lists.parquet'), 'other values than text'),
        (dict(input=tmp_path / 'nowhere'), 'there is no file or folder'),
        (dict(input=tmp_path / 'a.txt'), r'must be Parquet \(.parquet\) or JSON Lines'),
        (dict(input=f'{pages},{tmp_path / "empty.jsonl"}'), 'not both'),
        (dict(input=tmp_path / 'empty.jsonl'), "can't read|no documents"),
        (dict(input=tmp_path / 'broken.parquet'), "can't read .*broken.parquet: .*check the file"),
        (dict(input=pages, name='owner/pages'), 'plain folder name'),
    ):
        where = {} if 'name' in keys else dict(out_dir=tmp_path / 'out')
        with pytest.raises(UserError, match=message) as error:
            prepare(HUB, **{'tokenizer': 'byte', **keys, **where})
        assert '\n' not in str(error.value)
    assert not (tmp_path / 'out' / 'meta.json').exists()


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    """A Parquet file of 12 MB that no compression makes small."""
    import pyarrow
    import pyarrow.parquet

    path, draw = tmp_path_factory.mktemp('large') / 'large.parquet', random.Random(0)
    table = pyarrow.table({'text': [draw.randbytes(1500).hex() for _ in range(4000)], 'id': range(4000)})
    pyarrow.parquet.write_table(table, path, row_group_size=300)
    return path


@pytest.mark.parametrize('flag, code', [('--column=id', 2), ('--tokens=20000', 0)])
def test_a_stop_in_the_middle_of_a_file_ends_the_process(flag, code, large, tmp_path):
    """Threads of PyArrow that still read ahead would abort it two times in five, or keep it from ending."""
    for number in range(2):
        command = [sys.executable, HUB, f'--input={large}', f'--out_dir={tmp_path}/{number}', flag]
        done = subprocess.run([*command, '--tokenizer=byte', '--val_fraction=0.5'], cwd=ROOT, capture_output=True,
                              text=True, timeout=100)  # fmt: skip
        assert done.returncode == code, done.stderr
        assert code == 0 or done.stderr.splitlines()[-1].startswith("error: the column 'id'")
        assert 'Exception ignored' not in done.stderr


# ---- training on several files ---------------------------------------------------------------------------------------


def test_a_resumed_run_on_several_files_is_the_run(prepare, pages, tmp_path):
    for name, more in (('one', {}), ('some', dict(shard_tokens=300_000))):
        prepare(HUB, input=pages, out_dir=tmp_path / 'data' / name, **{**KEYS, **more})
    shape = dict(max_iters=6, lr_decay_iters=6, eval_interval=3)
    for name in ('one', 'some'):
        assert run('train.py', tmp_path / 'data', tmp_path / name, dataset=name, **shape).returncode == 0
    done = run('train.py', tmp_path / 'data', tmp_path / 'stopped', dataset='some', **{**shape, 'max_iters': 3})
    assert done.returncode == 0, done.stderr
    done = run('train.py', tmp_path / 'data', tmp_path / 'stopped', dataset='some', resume='yes', **shape)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / 'some', tmp_path / 'stopped')
    assert_same_run(tmp_path / 'some', tmp_path / 'one')  # and how many files there are changes nothing
    # other data under the same name is refused
    prepare(HUB, input=pages, out_dir=tmp_path / 'data' / 'some', **{**KEYS, 'shard_tokens': 300_000, 'split_seed': 2})
    done = run('train.py', tmp_path / 'data', tmp_path / 'stopped', dataset='some', resume='yes', **shape)
    assert done.returncode == 2 and 'is not the data set that the run' in done.stderr


def test_files_of_others_are_left_alone(prepare, tmp_path):
    """A progress.json and a meta.json of the user's, a folder that another process writes, a name that is a pattern."""
    (tmp_path / 'a.jsonl').write_text('{"text": "one"}\n' * 50)
    keys = dict(input=tmp_path / 'a.jsonl', tokenizer='byte', out_dir=tmp_path / 'out')
    (tmp_path / 'out').mkdir()
    for name, complaint in (('progress.json', "no stopped run's"), ('meta.json', "no data set's")):
        (tmp_path / 'out' / name).write_text('{"mine": 1}')
        with pytest.raises(UserError, match=complaint):
            prepare(HUB, **keys)
        assert (tmp_path / 'out' / name).read_text() == '{"mine": 1}'
        (tmp_path / 'out' / name).unlink()
    (tmp_path / 'b[1].jsonl').write_text('{"text": "one"}\n' * 50)
    with pytest.raises(UserError, match='read as a pattern'):
        prepare(HUB, **keys | dict(input=tmp_path / 'b[1].jsonl'))
