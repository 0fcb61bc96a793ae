"""configurator.py: what flags and config files mean, what it says when they mean nothing, and what it leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.keys import SCRIPTS, keys_of

from core.cli.errors import UserError

CONFIGURATOR = (ROOT / 'configurator.py').read_text(encoding='ascii')

BLOCK = '''\
"""
Does nothing, with keys.

$ python script.py --batch_size=4
"""

import math
from time import time

# ---- keys, with a few names that built-ins have as well
out_dir = 'out'  # where it goes
batch_size = 12  # sequences # in a micro-batch
learning_rate = 6e-4
dropout = 0.0
eval_only = False  # evaluate, then stop
decay_lr = True
start = '\\n'  # "quoted", for example
wandb_run_name = (
    'gpt2'  # the run's name
)
compile = 'auto'  # True, False or auto
device = 'auto'
len = 3
_private = 1
limits = (1, 2)
exec(open('configurator.py').read())
late = 5  # set after the block
'''
MORE_BLOCK = (
    'max_iters = 10; lr_decay_iters = 10; eval_interval = 10; eval_iters = 10; log_interval = 10\n'
    "always_save_checkpoint = True; wandb_log = False; wandb_project = 'owt'; dataset = 'openwebtext'\n"
    "init_from = 'scratch'; gradient_accumulation_steps = 40; block_size = 1024; weight_decay = 0.1\n"
    'warmup_iters = 10; min_lr = 1e-5; n_layer = 12; n_head = 12; n_embd = 768\n'
)
NAMES = {'math', 'time', '_private', 'limits'}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working directory, one process, and the excepthook as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    return tmp_path


@pytest.fixture
def configure(monkeypatch, tmp_path):
    """configure(*arguments) -> the globals of a script that has just executed the configurator."""

    def configure(*arguments, more=''):
        script = tmp_path / 'script.py'
        script.write_text(BLOCK, encoding='utf-8')
        monkeypatch.setattr(sys, 'argv', ['script.py', *arguments])
        names = {'__file__': str(script), '__name__': '__main__'}
        exec(more + BLOCK.split('exec(')[0], names)
        exec(CONFIGURATOR, names)
        return names

    return configure


def write(name, text):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text, encoding='utf-8')
    return name


@pytest.mark.parametrize(
    ('arguments', 'key', 'value'),
    [
        (['--batch_size=32'], 'batch_size', 32),
        (['--batch_size', '32'], 'batch_size', 32),
        (['--batch_size=1e4'], 'batch_size', 10000),
        (['--len=-1'], 'len', -1),
        (['--len', '-1'], 'len', -1),
        (['--dropout=0'], 'dropout', 0.0),
        (['--learning_rate=1'], 'learning_rate', 1.0),
        (['--learning_rate=3e-5'], 'learning_rate', 3e-5),
        (['--eval_only=true'], 'eval_only', True),
        (['--eval_only', 'TRUE'], 'eval_only', True),
        (['--eval_only=1'], 'eval_only', True),
        (['--decay_lr=False'], 'decay_lr', False),
        (['--decay_lr=false'], 'decay_lr', False),
        (['--decay_lr=0'], 'decay_lr', False),
        (['--compile=false'], 'compile', False),
        (['--compile=True'], 'compile', True),
        (['--compile=true', '--compile=auto'], 'compile', 'auto'),
        (['--device=cuda:1'], 'device', 'cuda:1'),
        (['--start=a=b==c'], 'start', 'a=b==c'),
        (['--start', 'a=b'], 'start', 'a=b'),
        (['--start='], 'start', ''),
        (['--start', ''], 'start', ''),
        (['--start=12'], 'start', '12'),
        (['--start=True'], 'start', 'True'),
        (['--start=-x'], 'start', '-x'),
        (['--start=--x'], 'start', '--x'),
        (['--start=\\n'], 'start', '\\n'),
        (['--start="\\n"'], 'start', '\n'),
        (["--start='a b'"], 'start', 'a b'),
        (["--start='twas"], 'start', "'twas"),
        (["--start=rock 'n' roll'"], 'start', "rock 'n' roll'"),
        (['--start=caf\u00e9'], 'start', 'caf\u00e9'),
        (['--len=4'], 'len', 4),
        (['--batch_size=1', '--batch_size=2'], 'batch_size', 2),
    ],
)
def test_flags_give_values_of_the_default_type(configure, arguments, key, value):
    names = configure(*arguments)
    assert names[key] == value
    assert type(names[key]) is type(value)
    assert names['config'][key] == value


def test_without_arguments_nothing_changes(configure, capsys):
    names = configure()
    assert names['config'] == dict(
        out_dir='out', batch_size=12, learning_rate=6e-4, dropout=0.0, eval_only=False, decay_lr=True, start='\n',
        wandb_run_name='gpt2', compile='auto', device='auto', len=3,
    )  # fmt: skip
    assert capsys.readouterr() == ('', '')


def test_it_leaves_the_keys_and_config_and_nothing_else(configure):
    write('x.py', 'import os\nbatch_size = 3\n_half = 2\ndef double(x): return 2 * x\n')
    names = configure('x.py', '--dropout=0.1', '--len=1')
    assert set(names) == NAMES | set(names['config']) | {
        'config',
        'given',
        '__file__',
        '__name__',
        '__builtins__',
        '__doc__',
    }
    assert names['__doc__'].strip().startswith('Does nothing')
    assert names['limits'] == (1, 2) and names['math'].__name__ == 'math' and callable(names['time'])
    assert 'limits' not in names['config'] and '_private' not in names['config']
    assert names['given'] == {'batch_size', 'dropout', 'len'}


def test_a_key_is_given_even_where_it_is_set_to_its_default(configure):
    assert configure(write('x.py', 'batch_size = 12\n'), '--dropout=0.0')['given'] == {'batch_size', 'dropout'}
    assert configure()['given'] == set()


def test_values_out_of_bounds_are_refused_wherever_they_come_from(configure):
    for arguments in (['--batch_size=0'], [write('y.py', 'batch_size = 0\n')]):
        with pytest.raises(UserError, match='batch_size is 0; it must be at least 1'):
            configure(*arguments)
    assert configure('y.py', '--batch_size=3')['batch_size'] == 3


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--batchsize=3'], ['--batchsize', 'did you mean --batch_size?']),
        (['--BATCH-SIZE=3'], ['did you mean --batch_size?']),
        (['--qqqq=3'], ['unknown key --qqqq', '--help']),
        (['--=3'], ['unknown key']),
        (['--'], ['unknown key']),
        (['--_private=3'], ['unknown key --_private']),
        (['--limits=3'], ['unknown key --limits']),
        (['--math=3'], ['unknown key --math']),
        (['--batch_size=many'], ['--batch_size', 'whole number (int)', "'many'"]),
        (['--batch_size=2.5'], ['--batch_size', 'whole number (int)', '2.5']),
        (['--batch_size=True'], ['whole number (int)', "'True'"]),
        (['--batch_size=inf'], ['whole number (int)', 'inf']),
        (['--batch_size='], ['whole number (int)', "''"]),
        (['--dropout=false'], ['--dropout', 'a number (float)', "'false'"]),
        (['--dropout=nan'], ['a number (float)', 'nan']),
        (['--dropout=1' + '0' * 400], ['a number (float)']),
        (['--eval_only=maybe'], ['--eval_only', 'True or False (bool)', "'maybe'"]),
        (['--eval_only=2'], ['True or False (bool)', "'2'"]),
        (['--dropout=0.1', '--batch_size'], ['--batch_size needs a value', '--batch_size=12']),
        (['-x'], ["'-x'", '--key=value']),
        (['-5'], ["'-5'", '--key=value']),
        (['batch_size=3'], ["'batch_size=3'", 'did you mean --batch_size=3?']),
        (['out'], ["'out'", '.py']),
        ([''], ["''", '.py']),
        (['config/train_small'], ["'config/train_small'", 'did you mean', 'train_small.py?']),
        (['train_smal.py'], ["'train_smal.py' does not exist", 'did you mean', 'train_small.py?']),
        (['config/qqqq.py'], ["'config/qqqq.py' does not exist", 'config/']),
        (['folder.py'], ["'folder.py'", "can't be read"]),
        (['latin.py'], ["'latin.py'", "can't be read"]),
    ],
)
def test_bad_arguments_get_one_line(configure, arguments, words):
    write('config/train_small.py', 'batch_size = 2\n')
    Path('folder.py').mkdir()
    Path('latin.py').write_bytes(b"out_dir = '\xe9'\n")
    with pytest.raises(UserError) as caught:
        configure(*arguments)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 300


def test_files_and_flags_apply_from_left_to_right(configure):
    write('a.py', 'batch_size = 2\nout_dir = "a"\n')
    write('b.py', 'batch_size = batch_size * 10\n')
    names = configure('--batch_size=7', 'a.py', 'b.py', '--out_dir', 'flag')
    assert (names['batch_size'], names['out_dir']) == (20, 'flag')
    names = configure('--batch_size=7', 'b.py', '--batch_size=8')
    assert names['batch_size'] == 8
    names = configure('--out_dir=flag', 'a.py')
    assert names['out_dir'] == 'a'


def test_files_are_python(configure):
    write(
        'x.py',
        '\ufeffimport math as m\nfrom os import path\n\n_base = 8\n\ndef _double(x):\n    return 2 * _base * x\n\n'
        'class Half:\n    size = 0.5\n\nbatch_size = _double(2)\ndropout = Half.size\nlearning_rate = m.sqrt(4) / 2\n'
        "start = 'caf\u00e9'\nout_dir = path.basename(__file__)\ncompile = False\nlen = batch_size - 2\n",
    )
    names = configure('x.py')
    expected = dict(batch_size=32, dropout=0.5, learning_rate=1.0, start='caf\u00e9', out_dir='x.py', compile=False)
    assert {key: names[key] for key in expected} == expected
    assert names['len'] == 30


def test_numbers_in_files_take_the_type_of_the_key(configure):
    write(
        'x.py',
        'import numpy\nbatch_size = 1e2\ndropout = 0\nlearning_rate = numpy.float32(1)\n'
        'len = numpy.int64(4)\nout_dir = numpy.str_("x")\n',
    )
    names = configure('x.py')
    for key, value in dict(batch_size=100, dropout=0.0, learning_rate=1.0, len=4, out_dir='x').items():
        assert names[key] == value
        assert type(names[key]) is type(value)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('batch_size = 1\nbatch_size = "many"\n', ['x.py:2', 'batch_size must be a whole number (int)', "'many'"]),
        ('batch_size = True\n', ['x.py:1', 'whole number (int), got True']),
        ('batch_size = 2.5\n', ['x.py:1', 'whole number (int), got 2.5']),
        ('eval_only = 1\n', ['x.py:1', 'eval_only must be True or False (bool), got 1']),
        ('dropout = True\n', ['x.py:1', 'dropout must be a number (float), got True']),
        ('dropout = "0.1"\n', ['x.py:1', "a number (float), got '0.1'"]),
        ('out_dir = 5\n', ['x.py:1', 'out_dir must be a string, got 5']),
        ('out_dir = True\n', ['x.py:1', 'out_dir must be a string, got True']),
        ('compile = 1\n', ['x.py:1', 'compile must be a string, True or False, got 1']),
        ('out_dir = None\n', ['x.py:1', 'out_dir must be a string, got None']),
        ('def batch_size(): pass\n', ['x.py', 'batch_size must be a whole number']),
        ('out_dir = ["' + 'x' * 500 + '"]\n', ['out_dir must be a string', '...']),
        ('dropout = 0.1\nbatch_size = = 3\n', ['x.py:2: SyntaxError']),
        ('if True:\nbatch_size = 3\n', ['x.py:2: IndentationError']),
        ('return 3\n', ['x.py:1: SyntaxError']),
        ('dropout = 0.1\n\nbatch_size = 1 // 0\n', ['x.py:3: ZeroDivisionError']),
        ('def _f():\n    return nowhere\n\ndropout = _f()\n', ['x.py:2: NameError', 'nowhere']),
        ('dropout = 0.1\nexec("a b")\n', ['x.py:2: SyntaxError']),
        ('import no_such_module_anywhere\n', ['x.py:1: ModuleNotFoundError']),
    ],
)
def test_bad_files_get_one_line_with_the_place(configure, text, words):
    write('x.py', text)
    with pytest.raises(UserError) as caught:
        configure('x.py')
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 300 and '\n' not in str(caught.value)


def test_a_config_file_in_nanogpts_manner(configure):
    """The same keys and the same habits as nanoGPT's finetune_shakespeare.py and train_gpt2.py."""
    write(
        'finetune.py',
        "import time\n\nout_dir = 'out-ft'\neval_interval = 5\neval_iters = 40\nwandb_log = False # off\n"
        "wandb_project = 'ft'\nwandb_run_name = 'ft-' + str(time.time())\n\ndataset = 'shakespeare'\n"
        "init_from = 'gpt2-xl' # the largest\nalways_save_checkpoint = False\nbatch_size = 1\n"
        'gradient_accumulation_steps = 32\nmax_iters = 20\nlearning_rate = 3e-5\ndecay_lr = False\n',
    )
    write(
        'gpt2.py',
        "wandb_log = True\nwandb_project = 'owt'\nwandb_run_name='gpt2-124M'\nbatch_size = 12\nblock_size = 1024\n"
        'gradient_accumulation_steps = 5 * 8\nmax_iters = 600000\nlr_decay_iters = 600000\neval_interval = 1000\n'
        'eval_iters = 200\nlog_interval = 10\nweight_decay = 1e-1\n',
    )
    names = configure('finetune.py', more=MORE_BLOCK)
    assert names['wandb_run_name'].startswith('ft-1') and callable(names['time'])
    assert names['config']['init_from'] == 'gpt2-xl' and names['config']['learning_rate'] == 3e-5
    names = configure('gpt2.py', more=MORE_BLOCK)
    assert names['gradient_accumulation_steps'] == 40 and names['wandb_log'] is True


FORKS = ROOT / 'tests' / 'support' / 'forks'
FORK_KEYS = {
    'derived_schedule': dict(
        batch_size=16,
        block_size=256,
        gradient_accumulation_steps=1,
        max_iters=1000,
        lr_decay_iters=977,
        warmup_iters=19,
        eval_iters=40,
        learning_rate=3e-3,
        min_lr=3e-3 / 10,
        wandb_run_name='schedule-977-of-4M',
    ),
    'chained_names': dict(
        dataset='chess_moves',
        wandb_project='chess_moves',
        out_dir='out-chess_moves',
        wandb_run_name='chess_moves-small',
        batch_size=8,
        n_layer=3,
        n_head=3,
        n_embd=96,
    ),
    'sizes_by_name': dict(n_layer=2, n_head=2, n_embd=64, dropout=0.0, wandb_log=False),
    'reads_its_sibling': dict(
        n_layer=2,
        n_head=2,
        n_embd=64,
        dropout=0.0,
        wandb_log=False,
        eval_interval=8,
        batch_size=6,
        learning_rate=1e-3,
    ),
}
OWN_NAMES = {
    'derived_schedule': 'tokens, tokens_per_step, steps',
    'chained_names': 'folder, vocab_size, micro_batch',
    'sizes_by_name': 'size, sizes, name, values, not_installed_anywhere',
    'reads_its_sibling': 'here, file, text, size, sizes, name, values, not_installed_anywhere, lines, '
    'block_sise (did you mean block_size?)',
}


@pytest.mark.parametrize('name', FORK_KEYS)
def test_files_with_names_of_their_own_run_as_in_nanogpt(configure, capsys, name):
    path = str(FORKS / f'{name}.py')
    names = configure(path, more=MORE_BLOCK)
    assert names['given'] == set(FORK_KEYS[name])
    for key, value in FORK_KEYS[name].items():
        assert names[key] == value and type(names[key]) is type(value), key
    assert not {'steps', 'folder', 'sizes', 'here', 'halved'} & set(names)
    notices = capsys.readouterr().err.splitlines()
    assert len(notices) == 2 and notices[0].startswith(f'{path} sets ')
    assert notices[1] == f'{path} also assigns what is no key and changes nothing here: {OWN_NAMES[name]}'


def test_files_find_the_script_s_imports_and_the_names_of_files_before_them(configure, capsys):
    write('a.py', 'width = 64\n')
    write('b.py', 'batch_size = math.isqrt(width)\nfrom math import pi\nlate = 5\n')
    names = configure('a.py', '--dropout=0.5', 'b.py')
    assert names['batch_size'] == 8 and 'width' not in names and 'pi' not in names
    notices = capsys.readouterr().err.splitlines()
    assert notices[1] == 'a.py also assigns what is no key and changes nothing here: width'
    assert notices[4] == 'b.py also assigns what is no key and changes nothing here: pi, late'


def test_keys_count_however_a_file_assigns_them(configure):
    """By a function, through globals(), in a file that it executes, even where the value is the default's."""
    write('inner.py', 'dropout = 0.0\n')
    write(
        'x.py',
        "exec(open('inner.py').read())\n"
        'def choose():\n    global batch_size\n    batch_size = 5\n'
        "choose()\nglobals().update(len=7)\nglobals()['learning_rate'] = 1e-2\ndevice = 'cpu'\ndel device\n",
    )
    names = configure('x.py')
    assert names['given'] == {'dropout', 'batch_size', 'len', 'learning_rate'}
    assert (names['batch_size'], names['len'], names['learning_rate'], names['device']) == (5, 7, 1e-2, 'auto')


def test_what_the_command_line_says_after_a_file_is_what_runs(configure):
    path = str(FORKS / 'derived_schedule.py')
    assert configure(path, '--max_iters=7', more=MORE_BLOCK)['max_iters'] == 7
    with pytest.raises(UserError, match='unknown key --tokens_per_step'):
        configure(path, '--tokens_per_step=7', more=MORE_BLOCK)


def test_one_line_for_each_file_and_group_of_flags(configure, capsys, monkeypatch):
    write('x.py', "# a secret comment\nbatch_size = 3\nout_dir = 'y'\ndropout = 0.0\n")
    write('same.py', 'batch_size = 3\n')
    arguments = ('--len=4', '--dropout', '0.5', '--len=5', 'x.py', 'same.py', '--eval_only=1')
    configure(*arguments)
    out, err = capsys.readouterr()
    assert out == ''
    assert err.splitlines() == [
        'command line sets len=5, dropout=0.5',
        'x.py sets out_dir, batch_size, dropout',
        'same.py changes nothing',
        'command line sets eval_only=True',
    ]
    monkeypatch.setenv('RANK', '1')
    configure(*arguments)
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_lists_every_key_with_value_and_comment(configure, capsys, flag):
    with pytest.raises(SystemExit) as caught:
        configure('--batch_size=64', flag, '--not_even_read')
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith('Does nothing, with keys.\n\n$ python script.py --batch_size=4\n\n')
    table = {line.split()[0]: line.split(None, 1)[1] for line in out.splitlines() if line.startswith('  --')}
    assert set(table) == {
        '--out_dir', '--batch_size', '--learning_rate', '--dropout', '--eval_only', '--decay_lr', '--start',
        '--wandb_run_name', '--compile', '--device', '--len',
    }  # fmt: skip
    assert table['--batch_size'].split(None, 1) == ['64', 'sequences # in a micro-batch']
    assert table['--learning_rate'] == '0.0006'
    assert table['--start'].split(None, 1) == [r"'\n'", '"quoted", for example']
    assert table['--wandb_run_name'].split(None, 1) == ["'gpt2'", "the run's name"]
    values = [len(line) - len(line.split(None, 1)[1]) for line in out.splitlines() if line.startswith('  --')]
    assert len(set(values)) == 1


def test_a_boolean_key_without_a_value_is_true(configure):
    assert configure('--eval_only')['eval_only'] is True
    assert configure('--eval_only', '--dropout=0.5')['eval_only'] is True
    assert configure('--eval_only', 'False')['eval_only'] is False


def test_help_after_a_key_is_not_its_value(configure):
    with pytest.raises(UserError, match='--dropout needs a value'):
        configure('--dropout', '-h')


def run(script, *arguments):
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_as_a_script_and_through_runpy(place):
    """The whole way: exit codes, one line on stderr, and the same script run by another with arguments put in front."""
    write('configurator.py', CONFIGURATOR)
    write('script.py', BLOCK + "print(batch_size, out_dir, compile, late, config['out_dir'], __name__)\n")
    front = "import runpy\nimport sys\n\nsys.argv[1:1] = ['--out_dir=front', '--batch_size=1']\n"
    write('wrapper.py', front + "runpy.run_path('script.py', run_name='__main__')\n")
    write('x.py', 'batch_size = 3\n')

    done = run('script.py', 'x.py', '--compile=true')
    assert (done.returncode, done.stdout) == (0, '3 out True 5 out __main__\n')
    done = run('wrapper.py', 'x.py')
    assert (done.returncode, done.stdout) == (0, '3 front auto 5 front __main__\n')
    done = run('wrapper.py', '--help')
    assert done.returncode == 0 and 'sequences # in a micro-batch' in done.stdout and "'front'" in done.stdout
    done = run('script.py', '--batchsize=1')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == 'error: unknown key --batchsize: did you mean --batch_size?\n'


# ---- before the slow imports -----------------------------------------------------------------------------------------


def without_libraries(script, *arguments):
    """The finished process of a script where nothing outside the standard library can be imported early."""
    program = (
        'import runpy, sys; sys.modules.update(dict.fromkeys(("torch", "numpy", "matplotlib", "tqdm"))); '
        'sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'
    )
    command = [sys.executable, '-c', program, str(script), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize('script', [*SCRIPTS, ROOT / 'train_mla.py'], ids=lambda path: str(path.relative_to(ROOT)))
def test_help_waits_for_no_library(script):
    done = without_libraries(script, '--help')
    assert done.returncode == 0 and 'Keys with their current values' in done.stdout and not done.stderr
    keys = keys_of(script if script.name != 'train_mla.py' else ROOT / 'train.py')
    if script.name == 'test_shakespeare_quick.py':
        keys = keys_of(ROOT / 'train.py') | keys
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith('  --')] == [f'--{k}' for k in keys]


@pytest.mark.parametrize('script', ['sample.py', 'train_mla.py', 'studies/gpu.py'])
@pytest.mark.parametrize(
    ('flag', 'said'),
    [
        ('--sead=1', 'unknown key --sead'),
        ('--out_dir', 'needs a value'),
        ('-x', 'unknown option'),
    ],
)
def test_a_wrong_flag_waits_for_no_library(script, flag, said):
    done = without_libraries(ROOT / script, '--out_dir=somewhere', flag)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and said in done.stderr and not done.stdout


def test_a_value_out_of_bounds_waits_for_no_library_and_a_config_file_for_all():
    done = without_libraries(ROOT / 'train.py', '--batch_size=0')
    assert done.returncode == 2 and 'batch_size is 0' in done.stderr
    assert 'import of torch halted' in without_libraries(ROOT / 'train.py', 'config/train_gpt2.py', '--help').stderr
