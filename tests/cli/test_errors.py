"""core/cli/errors.py and signals.py: mistakes end in one line, signals quietly; terminals get nothing to execute."""

import os
import signal
import subprocess
import sys

import pytest
from support import ROOT

from core.cli import errors, ranges
from core.cli.arguments import check_file, check_folder, names, whole_numbers
from core.cli.errors import UserError, printable

START = (
    'import sys\nfrom core.cli import signals\nsignals.exit_at_once()\n{}\n'
    'from core.cli import errors\nerrors.install()\n'
)


def run(program, imports='', shell='"{python}" -c "$PROGRAM"', **more):
    """The finished process of a script that begins as ours do; `imports` runs where they have their slow imports."""
    environment = dict(os.environ, PROGRAM=START.format(imports) + program, OMP_NUM_THREADS='1')
    command = ['bash', '-c', 'set -o pipefail; ' + shell.format(python=sys.executable)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, **more)


# ---- text that a terminal would execute ------------------------------------------------------------------------------


def test_control_characters_become_escapes():
    assert printable('\x1b]0;title\x07\x9b2J\r\x7f') == '\\x1b]0;title\\x07\\x9b2J\\r\\x7f'
    assert printable('a\u202eb\udcff') == 'a\\u202eb\\udcff'  # reversed writing; a byte that isn't UTF-8
    assert printable('two\nlines\tand \u4e2d\u6587, \u00e9') == 'two\nlines\tand \u4e2d\u6587, \u00e9'


def test_notices_errors_and_results_have_no_control_characters(capsys):
    errors.notice('a \x1b[31mname')
    errors.output('a \x1b[31mresult')
    with pytest.raises(SystemExit) as left:
        errors.report_user_errors(UserError, UserError('a \x1b[31mmistake\nin two lines'), None)
    out, err = capsys.readouterr()
    assert out == 'a \\x1b[31mresult\n' and err == 'a \\x1b[31mname\nerror: a \\x1b[31mmistake in two lines\n'
    assert left.value.code == 2


def test_a_name_that_is_not_utf8_can_be_printed():
    done = run("print('caf\\udce9')\nerrors.output('caf\\udce9')")
    assert (done.returncode, done.stdout, done.stderr) == (0, 'caf\\udce9\n' * 2, '')


def test_a_very_long_word_loses_its_middle(capsys):
    with pytest.raises(SystemExit):
        errors.report_user_errors(UserError, UserError(f"'{'a' * 100_000}' is missing"), None)
    assert len(capsys.readouterr().err) < 400


# ---- errors that no script catches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('program', 'line'),
    [
        ("open('/nowhere/a')", '/nowhere/a: No such file or directory'),
        ("open('a' * 300, 'w')", 'File name too long'),
        ("raise OSError(28, 'No space left on device')", 'No space left on device'),
        ("raise MemoryError('Unable to allocate 8 EiB')", 'out of memory (Unable to allocate 8 EiB)'),
        ("raise RuntimeError('x: can\\'t allocate memory: 8 EiB')", 'out of memory'),
        ("raise errors.UserError('two\\nlines')", 'two lines'),
    ],
)
def test_mistakes_end_in_one_line(program, line):
    done = run(program)
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.startswith('error: ') and line in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('program', ['1 / 0', "raise OSError('a bug')", "raise BrokenPipeError(32, 'of another')"])
def test_bugs_keep_their_traceback(program):
    done = run(program)
    assert done.returncode == 1 and 'Traceback' in done.stderr


# ---- signals and closed pipes ----------------------------------------------------------------------------------------

WAITS = (
    "import time\ntry:\n    print('here', flush=True)\n    time.sleep(30)\nfinally:\n    print('removed', flush=True)\n"
)


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize('phase', ['imports', 'work'])
def test_signals_end_a_script_quietly(number, code, phase):
    program = START.format(WAITS if phase == 'imports' else '') + (WAITS if phase == 'work' else '')
    command = [sys.executable, '-c', program]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'here\n'
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, '')
    assert out == ('removed\n' if phase == 'work' else '')  # the work's temporary files are removed


def test_a_second_signal_ends_what_cleans_up():
    program = START.format('') + "import time\ntry:\n    print('here', flush=True)\n    time.sleep(30)\n"
    program += "finally:\n    print('slow', flush=True)\n    time.sleep(30)\n"
    process = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in ('here\n', 'slow\n'):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


@pytest.mark.parametrize('program', ["print('a' * 1_000_000)\nprint('b' * 1_000_000)", "print('short')"])
def test_a_reader_that_leaves_early_gets_no_traceback(program):
    done = run('import time\ntime.sleep(0.3)\n' + program, shell='"{python}" -c "$PROGRAM" | true')
    assert done.returncode in (0, 141) and done.stderr == ''


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='this system has no /dev/full')
@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_results_that_cannot_be_written_are_an_error(unbuffered):
    """At the first print, or where Python keeps it back until the end, there."""
    done = run("print('short')", shell=f'PYTHONUNBUFFERED={unbuffered} "{{python}}" -c "$PROGRAM" > /dev/full')
    assert done.returncode == 2 and done.stderr.startswith('error: ')
    assert 'No space left on device' in done.stderr and done.stderr.count('\n') == 1


def test_help_can_be_cut_short():
    command = f'"{sys.executable}" sample.py --help | head -1'
    done = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith('Generate text') and done.stderr == ''


# ---- paths and lists -------------------------------------------------------------------------------------------------


def test_folders_that_can_be_written(tmp_path):
    check_folder(str(tmp_path / 'new' / 'newer'))
    check_folder(str(tmp_path))
    (tmp_path / 'file').write_text('')
    for path, reason in [('', 'it is empty'), (tmp_path / 'file', 'not a writable folder'), ('a' * 300, 'too long'),
                         (tmp_path / 'file' / 'deeper', 'not a writable folder')]:  # fmt: skip
        with pytest.raises(UserError, match=f'out_dir=.*{reason}.*choose another --out_dir'):
            check_folder(str(path))
    assert os.listdir(tmp_path) == ['file']


def test_files_that_can_be_written(tmp_path):
    check_file(str(tmp_path / 'new.json'), 'json')
    (tmp_path / 'old.json').write_text('{}')
    check_file(str(tmp_path / 'old.json'), 'json')
    for path, reason in [(tmp_path, 'it is a folder'), (tmp_path / 'no' / 'x', 'does not exist'), ('', 'it is empty'),
                         (tmp_path / 'old.json' / 'x', 'does not exist'), ('a' * 250, 'too long')]:  # fmt: skip
        with pytest.raises(UserError, match=f'json=.*{reason}.*choose another --json'):
            check_file(str(path), 'json')
    assert os.listdir(tmp_path) == ['old.json']


def test_lists():
    assert names('a, b,,c', 'models') == ['a', 'b', 'c'] and names('', 'models') == []
    assert whole_numbers('1,8', 'contexts') == [1, 8] and whole_numbers('', 'contexts') == []
    for text in (',', ' , ,'):
        with pytest.raises(UserError, match='names nothing'):
            names(text, 'models')
    for text in (',', '1,x', '1e30', '1,,2', '1,0', '-1', f'1{"0" * 30}'):
        with pytest.raises(UserError, match='contexts'):
            whole_numbers(text, 'contexts')


@pytest.mark.parametrize('key', ['out_dir', 'models', 'json', 'device'])
def test_names_cannot_contain_nul(key):
    assert 'character' in ranges.problem(key, 'a\0b')
    assert ranges.problem('start', 'a\0b') is None


def test_importing_errors_needs_no_torch():
    program = (
        "import sys, core.cli.errors, core.cli.signals; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT).returncode == 0
