"""
For test_fuzz.py: random command lines and random damage, as functions of a number, and what may follow.

Keys and their types are read from the scripts. Values are valid ones, ends of the bounds, and nonsense; a valid value
that would make a run long or large is not drawn, so that a success takes less than a second.
"""

import gzip
import json
import math
import pickle
import random
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from support import forking
from support.bad_input import ARGUMENTS, make_place
from support.keys import ROOT, SCRIPTS, keys_of

from core.cli import ranges
from core.text.tokenizer import CharTokenizer
from core.text.write_dataset import write_dataset

SECONDS, MEMORY = 60, 3 << 30
# imported before the fork; transformers and datasets take seconds
MODULES = (
    *forking.MODULES,
    'analysis.report',
    'analysis.latent',
    'analysis.circuits',
    'analysis.forward',
    'core.speed.rivals',
    'core.speed.planner',
    'core.cli.subprocesses',
    'core.runs.resume',
    'core.runs.folder',
    'safetensors.torch',
    'tokenizers',
    'tiktoken',
    'transformers.models.auto.modeling_auto',
    'transformers.tokenization_utils_fast',
    'transformers.models.gpt2.modeling_gpt2',
    'datasets',
)
REPOSITORY = ('*.py', 'ops/*.py', 'core/**/*.py', 'analysis/*', 'studies/*.py', 'config/*.py', 'data/*/*.py')

TINY = {
    'bench.py': {'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'vocab_size': 64, 'contexts': '8', 'rounds': 1,
                 'new_tokens': 0, 'nanogpt': '{place}/nowhere', 'compile': False},
    'compare.py': {'windows': 8, 'sample_tokens': 4, 'start': 'a'},
    'convert_mla.py': {'eval_tokens': 64, 'statistics_tokens': 64},
    'find_induction_heads.py': {'sequences': 8, 'length': 4, 'controls': 1, 'resamples': 100, 'ablate_sequences': 1,
                                'text_windows': 2},
    'sizing.py': {'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'vocab_size': 64, 'block_size': 16, 'contexts': '16'},
    'studies/induction.py': {'reuse': '{place}/study.json'},
    'studies/induction_text.py': {'out_dir': '{place}/out', 'data_dir': '{place}/nowhere'},  # it trains for minutes
    'studies/contest.py': {'out_dir': '{place}/out', 'data_dir': '{place}/nowhere'},  # as above
    'studies/bits.py': {'out_dir': '{place}/out', 'sources': '{place}/nowhere'},
    'studies/llama_cpp.py': {'gguf': '{place}/nowhere'},
    'studies/heads.py': {'out_dir': '{place}/out', 'models': '{place}/nowhere'},
    'studies/staircase.py': {'out_dir': '{place}/out', 'reuse': '{place}/nowhere'},  # as above
    'studies/latent_kernel.py': {'contexts': '8', 'batch_sizes': '1', 'n_latents': '8', 'n_head': 2, 'rounds': 1},
    'studies/pages.py': {'pictures': '{place}/out', 'tables': '{place}/out'},
    'studies/gpu.py': {'out_dir': '{place}/out', 'nanogpt': '{place}/nowhere', 'parts': 'memory'},  # as above
    'data/text/prepare.py': {'input': '{place}/text.txt'},
    'data/code/prepare.py': {'input': '{place}/texts', 'suffixes': '.md,.py', 'val_fraction': 0.5,
                             'split_seed': 1342},  # with one file in each split
    'data/hub/prepare.py': {'input': '{place}/pages', 'val_fraction': 0.3},
    'data/repeats/prepare.py': {'block_size': 16, 'min_period': 2},
}  # fmt: skip
WEIGHTS = {'train.py': 20, 'sample.py': 12, 'convert_mla.py': 10, 'train_mla.py': 8, 'data/text/prepare.py': 10,
           'find_induction_heads.py': 8, 'sizing.py': 2, 'data/hub/prepare.py': 8}  # fmt: skip
WRAPPED = {'train_mla.py': 'train.py', 'sample_mla.py': 'sample.py'}


# ---- the place -------------------------------------------------------------------------------------------------------


def copy_of_repository(folder):
    """A copy of the scripts and modules, in which nothing of the user's can be changed."""
    for pattern in REPOSITORY:
        for path in ROOT.glob(pattern):
            if path.is_file():
                (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / path.relative_to(ROOT))
    return folder


def furnish(place, repository):
    """What bad_input.make_place makes, and one file of every other kind that a script reads."""
    make_place(place)
    text = 'the cat sat on the mat; a rat sat on that. ' * 40
    (place / 'text.txt').write_text(text)
    (place / 'texts' / 'more').mkdir(parents=True)
    (place / 'texts' / 'a.md').write_text(text)
    (place / 'texts' / 'more' / 'b.txt.gz').write_bytes(gzip.compress(text.encode(), mtime=0))
    (place / 'texts' / 'c.py').write_text('print()\n')
    (place / 'pages').mkdir()
    pages = [{'text': f'{n} {text[: 40 * n]}'} for n in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pages), place / 'pages' / '0.parquet')
    (place / 'pages.jsonl').write_text(''.join(json.dumps(page) + '\n' for page in pages))
    ids = np.arange(1000) * 7 % 12
    for number in range(3):
        ids[300 * number : 300 * number + 300].astype('<u2').tofile(place / f'{number}.part')
    splits = {'train': tuple(place / f'{number}.part' for number in range(3)), 'val': ids[900:]}
    write_dataset(place / 'data' / 'shards', CharTokenizer('abcdefghijkl'), splits, source='three files')
    shutil.copytree(place / 'data' / 'tiny', place / 'data' / 'nano')
    (place / 'data' / 'nano' / 'meta.json').unlink()
    letters = {i: letter for i, letter in enumerate('abcdefghijkl')}
    content = {'vocab_size': 12, 'itos': letters, 'stoi': {letter: i for i, letter in letters.items()}}
    (place / 'data' / 'nano' / 'meta.pkl').write_bytes(pickle.dumps(content))
    study = json.loads((ROOT / 'assets' / 'induction_repeats.json').read_text())
    study['runs'] = [run for run in study['runs'] if run['seed'] < 1339 and run['n_latent'] in (0, 16)]
    (place / 'study.json').write_text(json.dumps(study))
    for name, ms in (('before', 2.0), ('after', 2.1)):
        (place / f'{name}.json').write_text(json.dumps({'steps': [{'name': 'MHA', 'batch_size': 1, 'ms': ms}]}))
    done = forking.run('export_hf.py', [f'--source={place}/mha', f'--out_dir={place}/hf'], root=repository,
                       modules=MODULES)  # fmt: skip
    assert done.returncode == 0, done.stderr


def contents(folder):
    """{path: bytes} of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


# ---- values ----------------------------------------------------------------------------------------------------------

NUMBERS = ['-1', '0', '1', '2', '3', '4', '7', '0.5', '-0.0', '1e-300', '1e30', '-1e30', '1e308', 'nan', 'inf', '-inf',
           '1.5', '1_0', '0x10', '9' * 30, '9' * 5000, '-' + '9' * 400, '1e400', '2e0', '\u0663']  # fmt: skip
WORDS = ['', ' ', ',', ',,', '1,2', '1,-1', '2,x', 'x', 'None', 'True', 'false', 'auto', '[1]', '{}', '$', '$x$', '%s',
         "'quoted'", '"a\\0b"', '"\\ud800"', "'", '"', '\x1b[31mred', '\x9b2J', '\u4e2d\u6587', '\udcff', '\u202e',
         'a' * 300, 'a/' * 2500, '/', '..', '\\frac{', '{0}', '--x', 'FILE:', 'gpt3', 'nul\nline']  # fmt: skip
PATHS = ['{place}', '{place}/nowhere', '{place}/mha', '{place}/mla', '{place}/mha/ckpt.pt', '{place}/prompt.txt',
         '{place}/data', '{place}/data/tiny', '{place}/data/tiny/train.bin', '{place}/text.txt', '{place}/texts',
         '{place}/study.json', '{place}/before.json', '{place}/hf', '{place}/config.py', '/dev/null', '/dev/zero',
         '/dev/stdin', '/proc/self/mem', '{place}/mha,{place}/mla', '{place}/mha,', '{place}/\x1b[31m',
         '{place}/' + 'a' * 300, '{place}/' + 'b/' * 2500]  # fmt: skip
# nothing that a script writes may be outside of the place
NEW = ['{place}/out', '{place}/out/deep/er', '{place}/out $x$', '{place}/out\u4e2d']
OUTPUTS = [*NEW, '{place}/mha', '{place}/mla', '{place}/prompt.txt', '{place}/config.py/x', '{place}/out\x1b[31m',
           '{place}/out\udcff', '{place}/' + 'a' * 300, '{place}/' + 'b/' * 2500, '/proc/nowhere', '/dev/null', '',
           '/dev/null/x', '{place}/out/x.json', '{place}/out.png', '{place}/hf', '"{place}/a\\0b"']  # fmt: skip
WRITTEN = ('out_dir', 'folder', 'json', 'figure', 'plot', 'table', 'profile', 'pictures', 'tables')
READ = ('data_dir', 'dataset', 'datasets', 'source', 'init_from', 'models', 'runs', 'sweep', 'reuse', 'input', 'files',
        'text', 'nanogpt', 'start', 'prose')  # fmt: skip
VALID = {
    'device': ['cpu', 'auto', 'cpu:0'], 'start': ['a', 'bcd', 'FILE:{place}/prompt.txt'], 'stop': ['', 'b'],
    'source': ['{place}/mha', '{place}/mha/ckpt.pt', '{place}/hf'], 'reuse': ['{place}/study.json'],
    'mode': ['sample'], 'contexts': ['4,8'], 'init_from': ['scratch', '{place}/mha', '{place}/hf'],
    'models': ['{place}/mha', '{place}/mha,{place}/mla', '{place}/hf'], 'input': ['{place}/text.txt', '{place}/texts'],
    'runs': ['{place}/mha', '{place}/mla,{place}/mha'], 'hub': [''], 'column': ['text'],
    'tokenizer': ['char', 'byte', 'bpe'], 'suffixes': ['.txt', '.md,.py'], 'keep_checkpoints': ['', '1', '1,2'],
    'gpu': ['H100', 'l4', 'A100-80GB', 't4'], 'shape': ['', 'gpt2'], 'n_latents': ['', '8,4'],
    'n_kv_heads': ['', '1'], 'dataset': ['tiny', 'nano', 'shards'], 'sweep': ['', '4,8'],
    'json': ['', '{place}/out.json'], 'name': ['x'], 'datasets': ['tiny', 'nano', 'tiny,wide'],
    'packages': ['', 'tqdm'], 'batch_sizes': ['1', '1,2'],
}  # fmt: skip
# keys whose valid values may be larger than 8: they are cheap, or the data bounds them
ANY = ('seed', 'split_seed', 'lr_decay_iters', 'warmup_iters', 'eval_interval', 'log_interval', 'top_k', 'eval_iters',
       'checkpoint_interval', 'drawn_from', 'shard_tokens', 'show', 'n_head', 'n_latent', 'n_rope', 'n_latent_q',
       'n_kv_head', 'gpus', 'tokens')  # fmt: skip
LARGEST = dict.fromkeys(ANY, math.inf) | {
    'resamples': 200, 'sequences': 16, 'length': 16, 'statistics_tokens': 1000, 'eval_tokens': 1000, 'n_embd': 64,
    'block_size': 64, 'vocab_size': 500, 'rows': 64, 'val_rows': 64}  # fmt: skip
# (key, value) pairs that work, and take long or leave the place: compiling, the network, other programs, all files
LEFT_OUT = dict.fromkeys(
    ('compile', 'wandb_log', 'download', 'huggingface', 'full', 'convert'), ('true', 'yes', '1', 'on')
)
LEFT_OUT |= {
    'mode': ('train', 'sample'),
    'follow': tuple(map(str, range(1, 17))),
    'input': ('/', '..', '{place}', ''),
    'reuse': ('',),
}


def value(draw, script, key, default, valid):
    """A random value for a key, as text; valid: one of the right type, within its bounds."""
    while True:
        text = valid_value(draw, key, default) if valid else some_value(draw, key, default)
        if text.strip().lower() in LEFT_OUT.get(key, ()) or not is_short(key, default, text):
            continue
        if key in WRITTEN and script.startswith('data/') and not text.strip('\'"'):
            continue  # the repository's own data folder
        return text


def valid_value(draw, key, default):
    """A value of the right type, within its bounds."""
    if isinstance(default, bool):
        return draw.choice(['True', 'False', 'yes', 'off', '0', '1'])
    if key in ranges.CHOICES:
        return str(draw.choice(ranges.CHOICES[key]))
    if isinstance(default, (int, float)):
        low, step = ranges.ends(ranges.BOUNDS[key])[0], 1 if isinstance(default, int) else 0.1
        numbers = [low, low + step, low + 2 * step, 1, 2, 3, 4, 8, 16, default]
        return str(draw.choice([n for n in numbers if ranges.inside(key, n)]))
    return draw.choice(VALID.get(key, NEW if key in WRITTEN else [default]))


def some_value(draw, key, default):
    """Any value, most often nonsense."""
    kind = draw.random()
    if key in WRITTEN:
        return draw.choice(OUTPUTS)
    if key in READ and kind < 0.7:
        return draw.choice(PATHS)
    if key in ranges.BOUNDS and kind < 0.5:
        low, high = ranges.ends(ranges.BOUNDS[key])
        return str(draw.choice([low - 1, low, low - 1e-9, high, high + 1]))
    if key == 'device' and kind < 0.6:
        return draw.choice(['meta', 'cuda:7', 'mps', 'xpu', 'cpu:x', 'cuda:-1'])
    return draw.choice(NUMBERS if isinstance(default, (int, float)) and kind < 0.9 else NUMBERS + WORDS)


def is_short(key, default, text):
    """False where a number is within its bounds, but so large that a run with it takes long."""
    if key not in ranges.BOUNDS or isinstance(default, float):
        return True
    try:
        numbers = [float(part) for part in text.split(',')]
    except ValueError:
        return True
    return not any(n > LARGEST.get(key, 8) and ranges.inside(key, n) for n in numbers)


# ---- command lines ---------------------------------------------------------------------------------------------------

KEYS = {str(path.relative_to(ROOT)): keys_of(path) for path in SCRIPTS}
for wrapper, script in WRAPPED.items():
    KEYS[wrapper] = KEYS[script]


def usual(script):
    """Arguments with which a script does something small."""
    return {**ARGUMENTS.get(script, {}), **TINY.get(script, {})}


def command_line(number):
    """The script and the arguments of command line `number`: (str, list of str). {place} stands for the place."""
    draw = random.Random(f'line {number}')
    names = sorted(KEYS)
    script = draw.choices(names, [WEIGHTS.get(name, 4) for name in names])[0]
    arguments = [f'--{key}={value}' for key, value in usual(script).items()]
    share = draw.choice([0.3, 0.8, 1])  # of valid values
    for _ in range(draw.choice([1, 2, 3, 5])):
        key = draw.choice(sorted(KEYS[script]))
        text = value(draw, script, key, KEYS[script][key], draw.random() < share)
        arguments += [f'--{key}={text}'] if draw.random() < 0.9 else [f'--{key}', text]
    if script == 'test_shakespeare_quick.py' or draw.random() < 0.1:
        arguments.insert(draw.randrange(len(arguments) + 1), draw.choice(noise(draw, script)))
    return script, arguments


def noise(draw, script):
    """Arguments that are no valid flag of the script."""
    key = draw.choice(sorted(KEYS[script]))
    return [f'--{key[:-1]}=1', f'--{key}', f'{key}=1', '-x', '--', '---', '--=1', f'--{key.upper()}=1', '',
            '{place}/nowhere.py', '{place}/prompt.txt', 'config/train_gpt2', '\x1b[31m.py', 'a' * 300 + '.py',
            '{place}/data.py', '--help']  # fmt: skip


# ---- damage ----------------------------------------------------------------------------------------------------------

RESUME = ['--resume=yes', '--max_iters=2', '--batch_size=2', '--gradient_accumulation_steps=1', '--eval_iters=1',
          '--device=cpu', '--threads=1', '--data_dir={place}/data', '--compile=False', '--wandb_log=False',
          '--log_interval=1', '--eval_interval=1', '--keep_checkpoints=', '--dtype=float32']  # fmt: skip


def with_usual(script, *arguments):
    """The script with its usual arguments and some more."""
    return script, [f'--{key}={value}' for key, value in usual(script).items()] + list(arguments)


MHA = [('train.py', ['--out_dir={place}/mha', *RESUME]), with_usual('sample.py'), with_usual('convert_mla.py'),
       with_usual('export_hf.py'), with_usual('find_induction_heads.py'),
       with_usual('train.py', '--init_from={place}/mha'),
       with_usual('find_induction_heads.py', '--models=', '--sweep={place}/mha')]  # fmt: skip
MLA = [('train_mla.py', ['--out_dir={place}/mla', *RESUME]), with_usual('sample_mla.py'),
       with_usual('export_hf.py', '--source={place}/mla'), with_usual('train_mla.py', '--init_from={place}/mla'),
       with_usual('find_induction_heads.py', '--models={place}/mla')]  # fmt: skip
DATA = [with_usual('train.py'), with_usual('convert_mla.py'), MHA[0], with_usual('find_induction_heads.py'),
        with_usual('corpus_statistics.py')]  # fmt: skip
ROWS = [with_usual('train.py', '--dataset=rows', '--block_size=10'),
        with_usual('corpus_statistics.py', '--datasets=rows', '--block_size=10')]  # fmt: skip
SHARDS = [with_usual('train.py', '--dataset=shards'), with_usual('corpus_statistics.py', '--datasets=shards')]
HF = [with_usual('sample.py', '--init_from={place}/hf'), with_usual('train.py', '--init_from={place}/hf'),
      with_usual('convert_mla.py', '--source={place}/hf', '--dataset=tiny'),
      with_usual('find_induction_heads.py', '--models={place}/hf')]  # fmt: skip
TEXT = [with_usual('data/text/prepare.py', f'--input={{place}}/{name}', f'--tokenizer={kind}')
        for name in ('texts', 'text.txt') for kind in ('char', 'byte', 'bpe')]  # fmt: skip
CODE = [with_usual('data/code/prepare.py', f'--tokenizer={kind}') for kind in ('char', 'byte', 'bpe')]
PAGES = [with_usual('data/hub/prepare.py', f'--input={{place}}/{name}', f'--tokenizer={kind}')
         for name in ('pages', 'pages.jsonl') for kind in ('byte', 'bpe')]  # fmt: skip
# file of the place: the command lines that read it
READERS = {
    'mha/ckpt.pt': MHA * 3,
    'mla/ckpt.pt': MLA * 3,
    'data/tiny/meta.json': DATA * 2,
    'data/tiny/train.bin': DATA,
    'data/tiny/val.bin': DATA,
    'data/rows/train.bin': ROWS,
    'data/rows/val.mask.bin': ROWS,
    'data/rows/meta.json': ROWS,
    'data/shards/train_00001.bin': SHARDS,
    'data/shards/meta.json': SHARDS * 2,
    'data/nano/meta.pkl': [with_usual('train.py', '--dataset=nano')] * 2,
    'mha/log.csv': MHA[:1] * 2,
    'config.py': [with_usual('train.py', '{place}/config.py', '--max_iters=1')] * 2,
    'prompt.txt': [with_usual('sample.py', '--start=FILE:{place}/prompt.txt'),
                   with_usual('data/shakespeare_char/prepare.py')],
    'text.txt': TEXT[3:],
    'pages/0.parquet': PAGES[:2],
    'pages.jsonl': PAGES[2:],
    'texts/a.md': TEXT[:3] + CODE,
    'texts/more/b.txt.gz': TEXT[:3],
    'study.json': [with_usual('studies/induction.py')] * 3,
    'before.json': [with_usual('bench.py')] * 2,
    'hf/config.json': HF,
    'hf/model.safetensors': HF,
}  # fmt: skip
JUNK = [None, -1, 0, 1, 1.5, 1e308, math.nan, math.inf, True, '', 'x', '\x1b[31m', '\ud800', 'a' * 1000, [], {}, [1],
        [[]], {'a': 1}, 10**30, 2**63, -(2**63), 65536, 10**9, 'mla', 'bpe', 'none', 'gpt2']  # fmt: skip


def damage(number, place):
    """Damage one file of the place, as number says; returns a command line that reads it: (str, list of str)."""
    draw = random.Random(f'damage {number}')
    names = sorted(READERS)
    name = draw.choices(names, [len(READERS[name]) for name in names])[0]
    path = place / name
    if name.endswith(('.json', '.pt', '.pkl')) and draw.random() < 0.6:
        change_values(draw, path)
    else:
        change_bytes(draw, path, place)
    return draw.choice(READERS[name])


def change_bytes(draw, path, place):
    """Cut, flip, replace or append bytes of a file, or put something else in its place."""
    whole = bytearray(path.read_bytes())
    at = draw.randrange(len(whole) or 1)
    kind = draw.choice(['cut', 'cut', 'flip', 'flip', 'flip', 'overwrite', 'insert', 'random', 'empty', 'zeros',
                        'append', 'other', 'folder', 'lines'])  # fmt: skip
    if kind == 'folder':
        path.unlink()
        path.mkdir()
        return
    if kind == 'flip':
        for _ in range(draw.choice([1, 1, 2, 8])):
            whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    junk = draw.randbytes(draw.choice([1, 2, 16, 300]))
    changed = {
        'cut': whole[:at],
        'overwrite': whole[:at] + junk + whole[at + len(junk) :],
        'insert': whole[:at] + junk + whole[at:],
        'random': draw.randbytes(len(whole)),
        'empty': b'',
        'zeros': bytes(len(whole)),
        'append': whole + junk,
        'other': (place / draw.choice(sorted(READERS))).read_bytes(),
        'lines': b'\n'.join(draw.sample(bytes(whole).split(b'\n'), k=len(bytes(whole).split(b'\n')))),
    }
    path.write_bytes(changed.get(kind, whole))


def change_values(draw, path):
    """Replace, remove or rename one value of a JSON file, a checkpoint or a pickle, at any depth."""
    load, dump = {
        '.json': (lambda: json.loads(path.read_text()), lambda value: path.write_text(json.dumps(value))),
        '.pt': (lambda: torch.load(path), lambda value: torch.save(value, path)),
        '.pkl': (lambda: pickle.loads(path.read_bytes()), lambda value: path.write_bytes(pickle.dumps(value))),
    }[path.suffix]
    value = load()
    junk = list(JUNK)
    if path.suffix == '.pt':
        junk += [torch.zeros(3), torch.tensor(math.nan), torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(0)]
    where, inner = value, value
    for _ in range(draw.choice([1, 1, 2, 2, 3, 4, 5])):
        if not isinstance(inner, (dict, list)) or not inner:
            break
        where = inner
        key = draw.choice(list(where) if isinstance(where, dict) else range(len(where)))
        inner = where[key]
    kind = draw.choice(['replace', 'replace', 'replace', 'remove', 'rename', 'tensor'])
    if kind == 'tensor' and isinstance(inner, torch.Tensor):
        where[key] = draw.choice([inner * math.nan, inner.double(), inner.half(), inner.flatten(), inner * 1e38,
                                  inner.to(torch.int8), inner.unsqueeze(0), inner.T.contiguous(), inner * 0,
                                  inner.to_sparse() if inner.dim() else inner])  # fmt: skip
    elif kind == 'remove':
        del where[key]
    elif kind == 'rename' and isinstance(where, dict):
        where[draw.choice(['x', 1, ''])] = where.pop(key)
    else:
        where[key] = draw.choice(junk)
    dump(draw.choice(junk) if draw.random() < 0.03 else value)


# ---- what may follow -------------------------------------------------------------------------------------------------


def run(repository, place, script, arguments):
    """The finished process of a command line, {place} replaced."""
    arguments = [argument.replace('{place}', str(place)) for argument in arguments]
    return forking.run(script, arguments, SECONDS, MEMORY, repository, MODULES)


def faults(done, before, after):
    """What is wrong with the end of a script, a list of str: it succeeds, or fails in one line and changes nothing."""
    found = []
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    if 'Traceback' in done.stderr or 'Exception ignored' in done.stderr:
        found.append('a traceback')
    if '\x1b' in done.stdout + done.stderr or '\x9b' in done.stdout + done.stderr:
        found.append('control characters reach the terminal')
    if done.returncode not in (0, 2) and not (done.returncode == 1 and 'slower by more than' in done.stderr):
        found.append(f'exit code {done.returncode}')
    if done.returncode == 2 and (len(errors) != 1 or not done.stderr.splitlines()[-1].startswith('error: ')):
        found.append('not one line of error at the end')
    if any(len(line) > 2000 for line in errors):
        found.append('a very long line')
    left = [path for path in after if path.endswith(('.writing', '.tmp', '.lock'))]
    if left:
        found.append(f'left behind: {left}')
    if done.returncode:
        trained = 'not finite' in done.stderr  # a resumed run that diverged has logged until then
        changed = [path for path in before if after.get(path) != before[path]]
        changed = [path for path in changed if not (trained and path.endswith('log.csv'))]
        if changed:
            found.append(f'changed: {changed}')
    return found
