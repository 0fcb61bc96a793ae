"""data/openwebtext/prepare.py: the splits, resuming after kill -9, and what it says when the pages are missing."""

import json
import signal
import sys

import pytest
from support import forking
from support.preparing import ROOT, files_of, ids_of, start

from core.cli.errors import UserError
from core.text.dataset import TokenData
from core.text.tokenizer import load_tokenizer

WEB = 'data/openwebtext/prepare.py'
DOCUMENTS = [f'Page {i}: {"word " * (i % 50)}\n\nand more <|endoftext|> of page {i}.' for i in range(1000)]


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A folder with two Parquet files of DOCUMENTS."""
    datasets = pytest.importorskip('datasets')
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    folder = tmp_path / 'pages'
    folder.mkdir()
    for name, part in (('0.parquet', DOCUMENTS[:300]), ('1.parquet', DOCUMENTS[300:])):
        pyarrow.parquet.write_table(pyarrow.table({'text': part}), folder / name)
    return folder


def encoded(indices):
    tokenizer = load_tokenizer({'tokenizer': 'gpt2'})
    return [i for index in indices for i in [*tokenizer.encode(DOCUMENTS[index]), 50256]]


@pytest.mark.slow
def test_web_pages(prepare, pages, gpt2_cache, tmp_path):
    import datasets

    out, _ = prepare(WEB, input=pages, out_dir=tmp_path / 'out', val_fraction=0.01)
    split = datasets.Dataset.from_dict({'i': list(range(1000))}).train_test_split(
        test_size=0.01, seed=2357, shuffle=True
    )
    validation = split['test']['i']  # as nanoGPT draws them
    assert ids_of(tmp_path / 'out', 'val').tolist() == encoded(sorted(validation))
    assert ids_of(tmp_path / 'out', 'train').tolist() == encoded(i for i in range(1000) if i not in set(validation))
    assert set(files_of(tmp_path / 'out')) == {'train.bin', 'val.bin', 'meta.json'}
    assert TokenData(tmp_path / 'out', 64).corpus == '1,000 documents of pages' and 'tokens/s' in out


KILLED = """
import os, runpy, signal, sys
replace, calls = os.replace, []
def killed(source, target):
    calls.append(str(target))
    if sum(call.endswith('progress.json') for call in calls) == 2:  # the second file is on disk, but not recorded
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
runpy.run_path({script!r}, run_name='__main__')
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='there is no kill -9 here')
def test_web_pages_resume_after_kill_9(prepare, pages, gpt2_cache, tmp_path, monkeypatch):
    keys = dict(input=pages, val_fraction=0.1, shard_tokens=4000)
    out_dir = tmp_path / 'killed'
    arguments = [f'--{key}={value}' for key, value in {**keys, 'out_dir': out_dir}.items()]
    monkeypatch.setattr(sys, 'executable', forking.interpreter())
    done = start('-c', KILLED.format(script=str(ROOT / WEB)), *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = json.loads((out_dir / 'progress.json').read_text())
    with open(max(out_dir.glob('train_*.part')), 'ab') as file:
        file.write(b'half a document')
    _, err = prepare(WEB, **keys, out_dir=out_dir)
    assert f'resuming after {before["documents"]:,} documents' in err and 0 < before['rows'] < 1000
    prepare(WEB, **keys, out_dir=tmp_path / 'whole')
    killed, whole = files_of(out_dir), files_of(tmp_path / 'whole')
    killed.pop('progress.json.writing', None)
    assert killed == whole and len(whole) > 5


@pytest.mark.slow
def test_web_pages_with_other_settings_start_a_new_run(prepare, pages, gpt2_cache, tmp_path):
    for journal, message in (
        ('{"of": {"documents": 5}, "documents": 5, "bytes": 0}', 'other documents or settings'),  # of version 0.1.0
        ('{', 'progress.json is broken'),
    ):
        (tmp_path / 'out').mkdir(exist_ok=True)
        (tmp_path / 'out' / 'train.bin.part').write_bytes(b'old')
        (tmp_path / 'out' / 'progress.json').write_text(journal)
        _, err = prepare(WEB, input=pages, out_dir=tmp_path / 'out', val_fraction=0.01)
        assert message in err and 50 < ids_of(tmp_path / 'out', 'train')[0] < 50257
        assert set(files_of(tmp_path / 'out')) == {'train.bin', 'val.bin', 'meta.json'}


@pytest.mark.slow
def test_web_pages_that_are_not_available(prepare, pages, gpt2_cache, tmp_path, monkeypatch):
    import huggingface_hub
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({'body': ['a', 'b']}), tmp_path / 'body.parquet')
    (tmp_path / 'broken.parquet').write_bytes(b'PAR1')

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand so on")

    for path, message in (
        ('nowhere', 'there is no file or folder nowhere'),
        (tmp_path / 'body.parquet', "no column 'text', only body"),
        (tmp_path / 'broken.parquet', "can't read .*broken.parquet"),
        (
            '',
            "can't read Skylion007/openwebtext: Couldn't reach the Hub; check --hub, .* the network",
        ),
    ):
        with monkeypatch.context() as patch:
            if not path:
                patch.setattr(huggingface_hub, 'HfApi', unreachable)
            with pytest.raises(UserError, match=message) as error:
                prepare(WEB, **({'input': path} if path else {}), out_dir=tmp_path / 'out')
        assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()
