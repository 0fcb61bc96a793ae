"""The scripts that prepare data: what they make, what they say, and that a bad input changes nothing."""

import contextlib
import gzip
import hashlib
import http.server
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from core import write_dataset
from core.dataset import TokenData
from core.runtime import UserError
from core.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CHAR, BPE, TEXT, WEB = (
    f'data/{name}/prepare.py' for name in ('shakespeare_char', 'shakespeare', 'text', 'openwebtext')
)
STAND_IN_SHA256 = '48eda5aba9aa2cd85b2ba18a81e815f3f48e5a6037025c245eddb20c2bb90b3f'


@pytest.fixture
def prepare(monkeypatch, capsys):
    """Runs a script in this process: prepare(script, key=value, ...) -> (stdout, stderr). UserErrors pass through."""

    def run(script, **keys):
        monkeypatch.setattr(sys, 'argv', [script, *(f'--{key}={value}' for key, value in keys.items())])
        monkeypatch.setattr(sys, 'path', list(sys.path))
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
        capsys.readouterr()
        runpy.run_path(str(ROOT / script), run_name='__main__')
        return capsys.readouterr()

    return run


def start(script, *arguments, cwd=ROOT, **env):
    """Runs a script as a user does; returns the finished process."""
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding='utf-8',
        timeout=120,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
    )


def split_of(folder, split):
    """All ids of a split, read without the help of tokens.py."""
    return np.fromfile(folder / f'{split}.bin', dtype='<u2')


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- the stand-in corpus ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def shakespeare_modules():
    """corpus.py and stand_in.py, which lie beside the script."""
    sys.path.insert(0, str(ROOT / 'data' / 'shakespeare_char'))
    import corpus
    import stand_in

    sys.path.remove(str(ROOT / 'data' / 'shakespeare_char'))
    return corpus, stand_in


@pytest.fixture(scope='module')
def stand_in_text(shakespeare_modules):
    return shakespeare_modules[1].generate()


def test_the_stand_in_is_the_same_everywhere(stand_in_text):
    assert hashlib.sha256(stand_in_text.encode('ascii')).hexdigest() == STAND_IN_SHA256


def test_the_stand_in_looks_like_the_real_text(stand_in_text, shakespeare_modules):
    text = stand_in_text
    assert len(text) >= 1_100_000 and text.endswith('\n') and not text.endswith('\n\n')
    assert ''.join(sorted(set(text))) == shakespeare_modules[1].CHARACTERS and len(set(text)) == 65
    assert set(text) == set(text[: int(len(text) * 0.9)])
    for speech in text.rstrip('\n').split('\n\n'):
        name, *lines = speech.split('\n')
        assert re.fullmatch('[A-Z][A-Za-z ]*:', name) and lines and all(lines), speech
        assert all(len(line) <= 64 and line == line.strip() for line in lines), speech
        assert not re.search(r'[<>]|\ba [aeiou]|  ', speech), speech
    names = re.findall(r'^(.*):$', text, re.MULTILINE)
    assert len(set(names)) > 60 and max(map(names.count, set(names))) < len(names) / 10


def test_the_stand_in_is_worth_learning(stand_in_text):
    """Several hundred words, sentences that seldom recur, and far from noise as well as from repetition."""
    words = re.findall("[a-z'-]+", stand_in_text.lower())
    assert 1000 < len(set(words)) < 3000
    sentences = re.findall(r'[^.?!]+[.?!]', stand_in_text)
    assert len(set(sentences)) > 0.95 * len(sentences)
    assert 0.2 < len(zlib.compress(stand_in_text.encode(), 9)) / len(stand_in_text) < 0.45


# ---- Shakespeare by characters ---------------------------------------------------------------------------------------


def test_shakespeare_char_from_a_file(prepare, tmp_path):
    (tmp_path / 'in.txt').write_bytes(b'\xef\xbb\xbf' + 'abcde\r\nf\u00e9'.encode() * 10)
    out, err = prepare(CHAR, input=tmp_path / 'in.txt', out_dir=tmp_path / 'out')
    meta = TokenData(tmp_path / 'out', 3).meta
    assert (
        meta['chars'] == '\nabcdef\u00e9'
        and meta['source'] == 'file in.txt'
        and meta['tokens'] == {'train': 72, 'val': 8}
    )
    assert meta['sha256']['input'] == write_dataset.file_sha256(tmp_path / 'in.txt')
    ids = np.concatenate([split_of(tmp_path / 'out', split) for split in ('train', 'val')])
    assert load_tokenizer(meta).decode(ids) == 'abcde\nf\u00e9' * 10
    assert re.search(r'72 training and 8 validation tokens \(char, 8 ids\) of file in.txt; [\d,]+ tokens/s\n', out)
    assert 'WARNING' not in err


def test_tinyshakespeare_by_characters(prepare, shared_data, tmp_path, monkeypatch):
    out, err = prepare(CHAR, input=shared_data / 'tinyshakespeare' / 'input.txt', out_dir=tmp_path)
    data = TokenData(tmp_path, 256)
    assert data.tokens == {'train': 1_003_854, 'val': 111_540} and data.n_vocab == data.padded_vocab_size == 65
    assert data.corpus == 'tinyshakespeare' and 'of tinyshakespeare;' in out and 'WARNING' not in err
    out, err = prepare(CHAR, download=False, out_dir=tmp_path)
    assert 'held tinyshakespeare (char); it is being replaced by stand-in corpus (generated) (char)' in err
    assert TokenData(tmp_path, 256).n_vocab == 65


def test_without_the_real_text_nobody_can_miss_it(prepare, tmp_path, stand_in_text):
    if any((ROOT / 'data' / name / 'input.txt').exists() for name in ('shakespeare', 'shakespeare_char')):
        pytest.skip('there is a local copy')
    out, err = prepare(CHAR, download=False, out_dir=tmp_path)
    frame = [line for line in err.splitlines() if line.startswith('#')]
    assert len(frame) > 8 and len({len(line) for line in frame[:-1]}) == 1
    assert 'WARNING: this is NOT Shakespeare.' in err and '--input=' in err
    data = TokenData(tmp_path, 256)
    assert data.corpus == 'stand-in corpus (generated)' and f'of {data.corpus};' in out
    assert sum(data.tokens.values()) == len(stand_in_text)


@pytest.mark.parametrize('case', ['missing', 'folder', 'empty', 'one character', 'latin-1'])
def test_a_bad_input_is_one_line_and_changes_nothing(case, prepare, char_data):
    path = char_data.parent / 'in.txt'
    {
        'missing': lambda: None,
        'folder': path.mkdir,
        'empty': path.touch,
        'one character': lambda: path.write_text('a'),
        'latin-1': lambda: path.write_bytes(b'fine\ncaf\xe9\n'),
    }[case]()
    before = files_of(char_data)
    with pytest.raises(UserError, match='not UTF-8 text .line 2' if case == 'latin-1' else '--input') as error:
        prepare(CHAR, input=path, out_dir=char_data)
    assert '\n' not in str(error.value) and files_of(char_data) == before


def test_as_a_user_runs_it(tmp_path):
    """From the folder of the script, under a locale without UTF-8; and a mistake is one line and exit code 2."""
    (tmp_path / 'in.txt').write_text('na\u00efve ' * 20, encoding='utf-8')
    arguments = (f'--input={tmp_path / "in.txt"}', f'--out_dir={tmp_path / "out"}')
    done = start('prepare.py', *arguments, cwd=ROOT / 'data' / 'shakespeare_char', LC_ALL='C', PYTHONUTF8='0')
    assert done.returncode == 0, done.stderr
    assert TokenData(tmp_path / 'out', 4).meta['chars'] == ' aenv\u00ef' and done.stdout.count('\n') == 1
    done = start(CHAR, '--input=nowhere.txt')
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.splitlines()[-1].startswith("error: --input=nowhere.txt can't be read")
    assert 'Traceback' not in done.stderr


# ---- the download ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(answer):
    """A web server on this machine; answer(handler) writes the reply."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):
                answer(self)

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{web.server_port}/input.txt'
    finally:
        web.shutdown()
        web.server_close()


def sends(data):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


@pytest.fixture
def corpus(shakespeare_modules, monkeypatch):
    """corpus.py with a short text in the place of tinyshakespeare, and a short stand-in."""
    corpus, stand_in = shakespeare_modules
    monkeypatch.setattr(corpus, 'SHA256', hashlib.sha256(b'To be').hexdigest())
    monkeypatch.setattr(stand_in, 'LENGTH', 1000)
    for variable in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(variable, raising=False)
    return corpus


def test_a_download_is_checked_and_kept(corpus, tmp_path):
    with server(sends(b'To be')) as url:
        text, source, checksum = corpus.find('', [tmp_path], url=url)
    assert (text, source, checksum) == ('To be', 'tinyshakespeare', corpus.SHA256)
    assert files_of(tmp_path) == {'input.txt': b'To be'}
    assert corpus.find('', [tmp_path / 'other', tmp_path], url=url) == (text, source, checksum)  # the server is gone


def test_a_download_that_fails_gives_the_stand_in(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, 'SECONDS', 0.2)

    def hangs(handler):
        time.sleep(3)

    def trickles(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b'x')
            time.sleep(0.05)

    cases = (
        (sends(b'Not to be'), 'SHA-256'),
        (lambda h: h.send_error(404), '404'),
        (hangs, 'Time'),
        (trickles, 'Time'),
    )
    for answer, reason in cases:
        begin = time.perf_counter()
        with server(answer) as url:
            _, source, _ = corpus.find('', [tmp_path], url=url)
        assert source == 'stand-in corpus (generated)' and time.perf_counter() - begin < 3
        err = capsys.readouterr().err
        assert 'WARNING' in err and reason in err.splitlines()[-1], err
        assert files_of(tmp_path) == {}


def test_a_folder_that_cannot_be_written_costs_the_copy_only(corpus, tmp_path, capsys):
    with server(sends(b'To be')) as url:
        assert corpus.find('', [tmp_path / 'missing'], url=url)[1] == 'tinyshakespeare'
    assert "can't be kept" in capsys.readouterr().err


# ---- Shakespeare in GPT-2's tokens -----------------------------------------------------------------------------------


def test_tinyshakespeare_in_gpt2_tokens(prepare, shared_data, gpt2_cache, tmp_path):
    out, _ = prepare(BPE, input=shared_data / 'tinyshakespeare' / 'input.txt', out_dir=tmp_path)
    data = TokenData(tmp_path, 1024)
    assert data.tokens == {'train': 301_966, 'val': 36_059} and (data.n_vocab, data.padded_vocab_size) == (50257, 50304)
    assert 'of tinyshakespeare;' in out
    assert load_tokenizer(data.meta).decode(split_of(tmp_path, 'train')[:8]) == 'First Citizen:\nBefore we proceed any'


# ---- own text --------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    """A folder of texts in several alphabets, and what they say in the order of their paths."""
    parts = {
        'a.txt': 'Stra\u00dfe und Haus\n' * 40,
        'b/c.md': '\u6771\u4eac\u3068\u5927\u962a\u3002' * 30,
        'b/d.txt': '',
        'b/e.txt.gz': "It's   late;\n\n\n  isn't it?\n" * 30,
        'z.txt': 'the end',
    }
    folder = tmp_path / 'texts'
    (folder / 'b').mkdir(parents=True)
    for name, text in parts.items():
        data = text.encode('utf-8')
        (folder / name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
    (folder / '.hidden.txt').write_text('secret')
    (folder / 'picture.png').write_bytes(b'\x89PNG')
    return folder, [text for text in parts.values() if text]


def test_own_text_by_characters(prepare, texts, tmp_path):
    folder, parts = texts
    text = ''.join(parts)
    out, _ = prepare(TEXT, input=folder, out_dir=tmp_path / 'out', val_fraction=0.25)
    meta = TokenData(tmp_path / 'out', 8).meta
    assert meta['chars'] == ''.join(sorted(set(text))) and meta['source'] == '5 files of texts'
    cut = int(len(text) * 0.75)
    tokenizer = load_tokenizer(meta)
    assert split_of(tmp_path / 'out', 'train').tolist() == tokenizer.encode(text[:cut])
    assert split_of(tmp_path / 'out', 'val').tolist() == tokenizer.encode(text[cut:])
    assert 'tokens/s' in out


def test_own_text_by_bytes_takes_any_bytes(prepare, tmp_path):
    data = bytes(range(256)) * 10 + b'\r\n\xff'
    (tmp_path / 'in.bin').write_bytes(data)
    prepare(TEXT, input=tmp_path / 'in.bin', out_dir=tmp_path / 'out', tokenizer='byte')
    train, val = (split_of(tmp_path / 'out', split).astype('u1').tobytes() for split in ('train', 'val'))
    assert train + val == data and len(train) == int(len(data) * 0.9)


def gpt2_documents(documents, cut):
    """Train and val ids of documents, each whole one followed by <|endoftext|>, cut at a character; by the slow way."""
    tokenizer = load_tokenizer({'tokenizer': 'gpt2'})
    splits, position = ([], []), 0
    for text in documents:
        for split, begin, stop in ((splits[0], 0, cut - position), (splits[1], cut - position, len(text))):
            inside = text[max(0, begin) : max(0, stop)]
            if inside:
                split += tokenizer.encode(inside) + [50256] * (stop >= len(text))
        position += len(text)
    return splits


@pytest.mark.parametrize('workers', [1, 3])
def test_own_text_in_gpt2_tokens(workers, prepare, texts, tmp_path, gpt2_cache, monkeypatch):
    folder, parts = texts
    monkeypatch.setattr(tokens, 'CHUNK', 50)
    chunks = write_dataset.chunks
    monkeypatch.setattr(tokens, 'chunks', lambda blocks: chunks(blocks, 50))
    prepare(TEXT, input=folder, out_dir=tmp_path / 'out', tokenizer='gpt2', workers=workers)
    train, val = gpt2_documents(parts, int(len(''.join(parts)) * 0.9))
    assert split_of(tmp_path / 'out', 'train').tolist() == train
    assert split_of(tmp_path / 'out', 'val').tolist() == val and val.count(50256) == 2


def test_own_text_a_document_per_line(prepare, tmp_path, gpt2_cache, monkeypatch):
    documents = [f'Document {i} says <|endoftext|> {"ha " * (i % 7)}' for i in range(200)]
    (tmp_path / 'in.txt').write_text('\n\n'.join(documents), encoding='utf-8')
    prepare(
        TEXT, input=tmp_path / 'in.txt', out_dir=tmp_path / 'out', tokenizer='gpt2', documents='line', val_fraction=0.5
    )
    ids = np.concatenate([split_of(tmp_path / 'out', split) for split in ('train', 'val')])
    tokenizer = load_tokenizer({'tokenizer': 'gpt2'})
    found = [tokenizer.decode(part[part != 50256]) for part in np.split(ids, np.flatnonzero(ids == 50256) + 1)[:-1]]
    assert ids[-1] == 50256 and found == documents


def test_own_text_in_pairs_learned_from_it(prepare, tmp_path):
    """By lines; what is for validation takes no part in the learning."""
    documents = [f'the {"fox" if i % 2 else "dog"} and the {i}' for i in range(300)] + ['zzzzzzzz'] * 100
    (tmp_path / 'in.txt').write_text('\n'.join(documents), encoding='utf-8')
    keys = dict(input=tmp_path / 'in.txt', tokenizer='bpe', documents='line', vocab_size=320, val_fraction=0.3)
    out, _ = prepare(TEXT, out_dir=tmp_path / 'out', **keys)
    meta = TokenData(tmp_path / 'out', 4).meta
    tokenizer, end = load_tokenizer(meta), meta['vocab_size'] - 1
    ids = np.concatenate([split_of(tmp_path / 'out', split) for split in ('train', 'val')])
    found = [tokenizer.decode(part[part != end]) for part in np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]]
    whole = [document for document in found if document in documents]
    assert ids[-1] == end and ''.join(found) == ''.join(documents) and len(whole) >= len(documents) - 2
    assert ' the' in meta['pieces'] and 'zz' not in meta['pieces'] and f'(bpe, {end + 1} ids)' in out
    first = (tmp_path / 'out' / 'train.bin').read_bytes()
    prepare(TEXT, out_dir=tmp_path / 'again', workers=2, **keys)
    assert (tmp_path / 'again' / 'train.bin').read_bytes() == first


def test_a_line_longer_than_a_block_stays_one_document(prepare, tmp_path, gpt2_cache):
    text = 'one two ' * 300_000 + '\nthe next\n' + 'x y ' * 100_000
    (tmp_path / 'in.txt').write_text(text, encoding='utf-8')
    prepare(TEXT, input=tmp_path / 'in.txt', out_dir=tmp_path / 'out', tokenizer='gpt2', documents='line')
    cut = int(len(text) * 0.9)
    first, second, third = text[:cut].split('\n')
    encode = load_tokenizer({'tokenizer': 'gpt2'}).encode
    assert split_of(tmp_path / 'out', 'train').tolist() == encode(first) + [50256] + encode(second) + [50256] + encode(
        third
    )
    assert split_of(tmp_path / 'out', 'val').tolist() == encode(text[cut:]) + [50256]


def test_a_byte_order_mark_and_windows_line_ends_go(prepare, tmp_path):
    (tmp_path / 'in.txt').write_bytes(b'\xef\xbb\xbf' + b'one\r\ntwo\r\n' * 9)
    prepare(TEXT, input=tmp_path / 'in.txt', out_dir=tmp_path / 'out')
    assert TokenData(tmp_path / 'out', 1).meta['chars'] == '\nenotw'


BAD = {
    'no input': (dict(input=''), 'say what to prepare'),
    'missing': (dict(input='nowhere'), 'there is no file or folder nowhere'),
    'no such files': (dict(suffixes='.tex'), 'there are no .tex files'),
    'not UTF-8': (dict(input='latin.txt'), r'not UTF-8 text \(line 3, byte 0xe9\).*--tokenizer=byte'),
    'broken gz': (dict(input='broken.txt.gz'), "broken.txt.gz can't be read"),
    'empty': (dict(input='empty.txt'), 'there is no text in'),
    'tokenizer': (dict(tokenizer='words'), 'must be char, byte, bpe or gpt2'),
    'documents': (dict(documents='page'), 'must be file or line'),
    'vocab_size': (dict(tokenizer='bpe', vocab_size=256), 'vocab_size=256 must be from 300'),
    'documents of char': (dict(documents='line'), 'needs --tokenizer=gpt2'),
    'val_fraction': (dict(val_fraction=1.0), 'above 0 and below 1'),
    'name': (dict(name='../other'), 'plain folder name'),
    'workers': (dict(workers=-1), 'must not be negative'),
    'own output': (dict(input='data/tiny/meta.json'), 'would be overwritten'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_arguments_change_nothing(case, prepare, texts, char_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('latin.txt').write_bytes(b'a\nb\ncaf\xe9\n' * 3)
    Path('broken.txt.gz').write_bytes(gzip.compress(b'text' * 1000)[:-20])
    Path('empty.txt').touch()
    keys, message = BAD[case]
    before = files_of(char_data)
    with pytest.raises(UserError, match=message) as error:
        prepare(TEXT, **{'input': texts[0], 'out_dir': char_data, **keys})
    assert '\n' not in str(error.value) and files_of(char_data) == before


def test_the_name_decides_the_folder(tmp_path):
    """A copy of the repository's scripts, so that nothing is written into this one."""
    for name in ('tokens.py', 'runtime.py', 'configurator.py', TEXT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / 'in.txt').write_text('some text of mine')
    done = start(TEXT, '--input=in.txt', '--name=mine', cwd=tmp_path, PYTHONPATH='')
    assert done.returncode == 0, done.stderr
    assert set(files_of(tmp_path / 'data' / 'mine')) == {'train.bin', 'val.bin', 'meta.json'}
    assert done.stdout.startswith(f'data{os.sep}mine: 15 training and 2 validation tokens')


# ---- OpenWebText -----------------------------------------------------------------------------------------------------

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


def test_web_pages(prepare, pages, gpt2_cache, tmp_path):
    import datasets

    out, _ = prepare(WEB, input=pages, out_dir=tmp_path / 'out', val_fraction=0.01, shard_documents=77)
    split = datasets.Dataset.from_dict({'i': list(range(1000))}).train_test_split(
        test_size=0.01, seed=2357, shuffle=True
    )
    validation = split['test']['i']  # as nanoGPT draws them
    assert split_of(tmp_path / 'out', 'val').tolist() == encoded(validation)
    assert split_of(tmp_path / 'out', 'train').tolist() == encoded(i for i in range(1000) if i not in set(validation))
    assert set(files_of(tmp_path / 'out')) == {'train.bin', 'val.bin', 'meta.json'}
    assert TokenData(tmp_path / 'out', 64).corpus == '1,000 documents of pages' and 'tokens/s' in out


KILLED = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
from core import write_dataset
sync, calls = write_dataset.sync, []
def killed(file):
    sync(file)
    calls.append(file)
    if len(calls) == 5:  # two shards are complete; the third is on disk and not yet in progress.json
        os.kill(os.getpid(), signal.SIGKILL)
write_dataset.sync = killed
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='there is no kill -9 here')
def test_web_pages_go_on_after_kill_9(prepare, pages, gpt2_cache, tmp_path):
    keys = dict(input=pages, val_fraction=0.01, shard_documents=100)
    out_dir = tmp_path / 'killed'
    code = KILLED.format(root=str(ROOT)).replace('sys.argv[0]', repr(str(ROOT / WEB)))
    arguments = [f'--{key}={value}' for key, value in {**keys, 'out_dir': out_dir}.items()]
    done = start('-c', code, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert set(files_of(out_dir)) == {'train.bin.part', 'progress.json'}
    with open(out_dir / 'train.bin.part', 'ab') as file:
        file.write(b'half a shard')
    _, err = prepare(WEB, **keys, out_dir=out_dir)
    assert 'going on after 200 of 1,000 documents' in err
    prepare(WEB, **keys, out_dir=tmp_path / 'whole')
    assert files_of(out_dir) == files_of(tmp_path / 'whole')


def test_web_pages_of_other_settings_start_anew(prepare, pages, gpt2_cache, tmp_path):
    for journal, message in (
        ('{"of": {"documents": 5}, "documents": 5, "bytes": 0}', 'of other documents or settings'),
        ('{', 'progress.json is broken'),
    ):
        (tmp_path / 'out').mkdir(exist_ok=True)
        (tmp_path / 'out' / 'train.bin.part').write_bytes(b'old')
        (tmp_path / 'out' / 'progress.json').write_text(journal)
        _, err = prepare(WEB, input=pages, out_dir=tmp_path / 'out', val_fraction=0.01)
        assert message in err and 50 < split_of(tmp_path / 'out', 'train')[0] < 50257
        assert set(files_of(tmp_path / 'out')) == {'train.bin', 'val.bin', 'meta.json'}


def test_web_pages_that_cannot_be_had(prepare, pages, gpt2_cache, tmp_path, monkeypatch):
    import datasets
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({'body': ['a', 'b']}), tmp_path / 'body.parquet')
    (tmp_path / 'broken.parquet').write_bytes(b'PAR1')

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand so on")

    for path, message in (
        ('nowhere', 'there is no Parquet file nowhere'),
        (tmp_path / 'body.parquet', "no column 'text', only body"),
        (tmp_path / 'broken.parquet', "can't load .*broken.parquet"),
        ('', "can't load Skylion007/openwebtext .*: Couldn't reach the Hub; check the network, or give Parquet files"),
    ):
        with monkeypatch.context() as patch:
            if not path:
                patch.setattr(datasets, 'load_dataset', unreachable)
            with pytest.raises(UserError, match=message) as error:
                prepare(WEB, input=path, out_dir=tmp_path / 'out')
        assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()
