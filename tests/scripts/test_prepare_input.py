"""data/text/prepare.py: pipes, folders of other files, text without spaces or too little of it, signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import forking
from support.preparing import ROOT, files_of, ids_of, unspaced

from core.cli.errors import UserError
from core.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

TEXT = 'data/text/prepare.py'


# ---- pipes and devices -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no named pipes')
@pytest.mark.parametrize('tokenizer', ['char', 'byte', 'bpe'])
def test_a_named_pipe_is_read_like_a_file(tokenizer, prepare, tmp_path):
    """The script reads its input several times, a pipe can be read once: opening it again would wait forever."""
    text = 'the cat sat on the mat; ' * 500
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'file.txt').write_text(text)
    writer = threading.Thread(target=lambda: (tmp_path / 'pipe').write_text(text), daemon=True)
    writer.start()
    _, err = prepare(TEXT, input=tmp_path / 'pipe', out_dir=tmp_path / 'a', tokenizer=tokenizer)
    writer.join(10)
    prepare(TEXT, input=tmp_path / 'file.txt', out_dir=tmp_path / 'b', tokenizer=tokenizer)
    assert ids_of(tmp_path / 'a', 'train').tolist() == ids_of(tmp_path / 'b', 'train').tolist()
    assert 'reading the pipe' in err and '"source": "text from a pipe"' in (tmp_path / 'a' / 'meta.json').read_text()


@pytest.mark.skipif(not os.path.isdir('/dev/fd'), reason='this system has no /dev/fd')
@pytest.mark.parametrize('script', [TEXT, 'data/shakespeare_char/prepare.py'])
def test_process_substitution(script, tmp_path):
    (tmp_path / 'in.txt').write_text('some text of mine\n' * 20)
    command = f'"{sys.executable}" {script} --input=<(cat "{tmp_path}/in.txt") --out_dir="{tmp_path}/out"'
    done = subprocess.run(['bash', '-c', command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '324 training and 36 validation tokens' in done.stdout


@pytest.mark.skipif(not os.path.exists('/dev/zero'), reason='this system has no /dev/zero')
def test_a_device_is_refused(prepare, tmp_path):
    with pytest.raises(UserError, match='/dev/zero is neither a file nor a folder nor a pipe'):
        prepare(TEXT, input='/dev/zero', out_dir=tmp_path / 'out')
    with pytest.raises(UserError, match='/dev/zero.*bytes.*must name a text file'):
        prepare('data/shakespeare_char/prepare.py', input='/dev/zero', out_dir=tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


# ---- other files, too little text ------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    """A folder with 30 Python files and one text."""
    folder = tmp_path / 'project'
    for n in range(30):
        (folder / f'part{n % 3}').mkdir(parents=True, exist_ok=True)
        (folder / f'part{n % 3}' / f'{n}.py').write_text(f'print({n})\n' * 10)
    (folder / 'README.md').write_text('Read me')
    (folder / 'LICENSE').write_text('free')
    return folder


def test_a_folder_of_other_files_is_no_data_set_of_three_tokens(prepare, sources, tmp_path):
    with pytest.raises(UserError, match='train.bin would have 6 tokens, too few for a block of 64'):
        prepare(TEXT, input=sources, out_dir=tmp_path / 'out')
    assert not list((tmp_path / 'out').glob('*'))
    with pytest.raises(UserError, match=r'no \.tex files in .* \(only 30 \.py, 1 \.md, 1 without suffix\).*--suffixes'):
        prepare(TEXT, input=sources, out_dir=tmp_path / 'out', suffixes='.tex')


def test_what_is_ignored_is_said(prepare, sources, tmp_path):
    (sources / 'README.md').write_text('Read me. ' * 50)
    _, err = prepare(TEXT, input=sources, out_dir=tmp_path / 'out')
    assert 'ignoring 30 .py, 1 without suffix; --suffixes=.txt,.md,.txt.gz selects' in err
    out, err = prepare(TEXT, input=sources, out_dir=tmp_path / 'out', suffixes='.py')
    assert 'ignoring 1 .md, 1 without suffix' in err and '30 files of project' in out


@pytest.mark.parametrize('tokenizer', ['byte', 'bpe'])
def test_a_text_shorter_than_a_block_is_refused(tokenizer, prepare, tmp_path):
    (tmp_path / 'in.txt').write_text('Read me')
    with pytest.raises(UserError, match='too few for a block of 64: prepare more text'):
        prepare(TEXT, input=tmp_path / 'in.txt', out_dir=tmp_path / 'out', tokenizer=tokenizer)
    assert not list((tmp_path / 'out').glob('*'))


def test_a_long_list_of_files_is_no_name(prepare, tmp_path):
    """Together longer than any path may be."""
    names = [tmp_path / f'{"a" * 100}{n}.txt' for n in range(50)]
    for name in names:
        name.write_text('some text ')
    out, _ = prepare(TEXT, input=','.join(map(str, names)), out_dir=tmp_path / 'out')
    assert '450 training and 50 validation tokens' in out


# ---- text without spaces ---------------------------------------------------------------------------------------------


def test_a_learned_encoding_of_text_without_spaces(prepare, tmp_path):
    """One word of 400,000 characters: learned from as a whole it would take an hour."""
    text = unspaced(400_000)
    (tmp_path / 'in.txt').write_text(text, encoding='utf-8')
    began = time.perf_counter()
    prepare(TEXT, input=tmp_path / 'in.txt', out_dir=tmp_path / 'out', tokenizer='bpe', vocab_size=1000)
    assert time.perf_counter() - began < 60  # 3 seconds on an idle core
    ids = [ids_of(tmp_path / 'out', split) for split in ('train', 'val')]
    meta = (tmp_path / 'out' / 'meta.json').read_text()
    tokenizer = load_tokenizer(json.loads(meta))
    assert sum(len(part) for part in ids) < 0.8 * len(text)  # it has learned words, not only characters
    assert ''.join(tokenizer.decode(part[part != tokenizer.end_of_text]) for part in ids) == text


# ---- signals ---------------------------------------------------------------------------------------------------------


SLOWLY = """
import runpy, time
from core.text.tokenizer import CharTokenizer
encode = CharTokenizer.encode_array
CharTokenizer.encode_array = lambda *given: time.sleep(0.5) or encode(*given)
runpy.run_path('data/text/prepare.py', run_name='__main__')
"""


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_encoding_leaves_the_old_data_set(number, code, tmp_path):
    (tmp_path / 'in.txt').write_text('the cat sat on the mat ' * 2_000_000)  # 175 pieces of half a second
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'train.bin').write_bytes(b'old')
    keys = [f'--input={tmp_path / "in.txt"}', f'--out_dir={tmp_path / "out"}', '--workers=1']
    process = subprocess.Popen(
        [forking.interpreter(), '-c', SLOWLY, *keys], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list((tmp_path / 'out').glob('unfinished-*')):
        time.sleep(0.001)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and 'Traceback' not in err, err
    assert files_of(tmp_path / 'out') == {'train.bin': b'old'}
