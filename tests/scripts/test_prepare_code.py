"""data/code/prepare.py: which files, split by whole files, with every tokenizer, and bad input."""

import gzip
import importlib.metadata
import platform
import re
import sysconfig
import types
from pathlib import Path

import numpy as np
import pytest
from support.preparing import ROOT, files_of, ids_of

from core.cli.errors import UserError
from core.text.dataset import TokenData
from core.text.tokenizer import BPETokenizer, load_tokenizer

CODE = 'data/code/prepare.py'


def write(folder, files):
    """Write {path: bytes or str} below a folder, in this order."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def sources():
    """{path: text} of 60 different files, in no order."""
    numbers = np.random.default_rng(0).permutation(60)
    return {f'part{n % 4}/module{n:02}.py': f'def f{n}():\n    """Number {n}"""\n    return {n}\n' for n in numbers}


def bytes_of(out):
    """{split: bytes} of a data set in bytes."""
    return {split: ids_of(out, split).astype('u1').tobytes() for split in ('train', 'val')}


def split_of(out, texts):
    """{text: split} of a data set in bytes. Each text must be in exactly one split, once."""
    found = {}
    for text in texts:
        (found[text],) = [split for split, data in bytes_of(out).items() for _ in range(data.count(text.encode()))]
    return found


# ---- files and splits ------------------------------------------------------------------------------------------------


def test_a_file_is_in_one_split_as_a_whole_and_in_order(prepare, sources, tmp_path):
    write(tmp_path / 'in', sources)
    out, _ = prepare(CODE, input=tmp_path / 'in', out_dir=tmp_path / 'out', val_fraction=0.3)
    where = split_of(tmp_path / 'out', sources.values())
    by_path = [sources[path] for path in sorted(sources)]
    for split, data in bytes_of(tmp_path / 'out').items():
        assert data.decode() == ''.join(text for text in by_path if where[text] == split)
    count = sum(split == 'val' for split in where.values())
    assert 9 <= count <= 27  # 60 draws of 0.3: this far from 18 once in 100 times
    meta = TokenData(tmp_path / 'out', 8).meta
    assert meta['splits']['val'] == {'files': count, 'bytes': meta['tokens']['val']} and meta['source'] in out
    assert meta['source'] == '60 files of in' and 'packages' not in meta


def test_the_order_of_the_file_system_does_not_matter(prepare, sources, tmp_path, monkeypatch):
    write(tmp_path / 'a', sources)
    write(tmp_path / 'else' / 'b', dict(reversed(sources.items())))
    prepare(CODE, input=tmp_path / 'a', out_dir=tmp_path / 'out')
    below = Path.rglob
    monkeypatch.setattr(Path, 'rglob', lambda *of: reversed(list(below(*of))))
    prepare(CODE, input=tmp_path / 'else' / 'b', out_dir=tmp_path / 'again')
    assert bytes_of(tmp_path / 'out') == bytes_of(tmp_path / 'again')


def test_more_files_move_none_and_the_seed_moves_some(prepare, sources, tmp_path):
    write(tmp_path / 'in', dict(list(sources.items())[:30]))
    some = list(sources.values())[:30]
    prepare(CODE, input=tmp_path / 'in', out_dir=tmp_path / 'few', val_fraction=0.3)
    write(tmp_path / 'in', sources)
    prepare(CODE, input=tmp_path / 'in', out_dir=tmp_path / 'all', val_fraction=0.3)
    prepare(CODE, input=tmp_path / 'in', out_dir=tmp_path / 'other', val_fraction=0.3, split_seed=1)
    assert split_of(tmp_path / 'few', some) == split_of(tmp_path / 'all', some)
    assert split_of(tmp_path / 'other', some) != split_of(tmp_path / 'all', some)


def test_what_is_left_out_is_counted_whatever_the_tokenizer(prepare, sources, tmp_path):
    first = next(iter(sources.values()))
    write(tmp_path / 'in', {**sources, 'copy.py': first, 'z/copy.py.gz': gzip.compress(first.encode()), 'empty.py': '',
                            'latin.py': b'# caf\xe9\n', '.hidden.py': 'x = 1\n', 'notes.txt': 'no code'})  # fmt: skip
    for tokenizer in ('byte', 'char'):
        keys = dict(input=tmp_path / 'in', suffixes='.py,.py.gz', tokenizer=tokenizer, val_fraction=0.3)
        _, err = prepare(CODE, out_dir=tmp_path / tokenizer, **keys)
        meta = TokenData(tmp_path / tokenizer, 8).meta
        assert meta['left_out'] == {'duplicate': 2, 'empty': 1, 'not UTF-8': 1}
        assert sum(part['files'] for part in meta['splits'].values()) == 60
        assert 'leaving out 2 duplicate files, 1 empty files, 1 not UTF-8 files' in err and 'ignoring 1 .txt' in err
    assert set(split_of(tmp_path / 'byte', sources.values()).values()) == {'train', 'val'}
    assert sum(len(data) for data in bytes_of(tmp_path / 'byte').values()) == sum(map(len, sources.values()))


def test_a_character_that_ends_in_the_next_block_is_utf8(prepare, sources, tmp_path):
    write(tmp_path / 'in', {**sources, 'long.py': '#' * ((1 << 20) - 1) + '\u6771\n', 'cut.py': b'# \xe6\x9d'})
    prepare(CODE, input=tmp_path / 'in', out_dir=tmp_path / 'out', val_fraction=0.3)
    meta = TokenData(tmp_path / 'out', 8).meta
    assert meta['left_out']['not UTF-8'] == 1 and sum(meta['tokens'].values()) > 1 << 20


def test_megabytes_takes_the_same_whole_files_each_time(prepare, tmp_path):
    texts = {f'{n:02}.py': f'# {n:02}\n' * 20_000 for n in range(30)}  # of 100 kB each
    write(tmp_path / 'in', texts)
    keys = dict(input=tmp_path / 'in', val_fraction=0.4)
    for name, more in (('one', {'megabytes': 1}), ('two', {'megabytes': 2}), ('all', {})):
        prepare(CODE, out_dir=tmp_path / name, **keys, **more)
    whole = {split: set(data.split(b'\n')) - {b''} for split, data in bytes_of(tmp_path / 'all').items()}
    found = {}
    for name, size in (('one', 10), ('two', 20)):
        parts = {split: set(data.split(b'\n')) - {b''} for split, data in bytes_of(tmp_path / name).items()}
        assert all(parts[split] <= whole[split] for split in whole)  # each in the split that it is in without the key
        found[name] = parts['train'] | parts['val']
        assert len(found[name]) == size
        assert sum(map(len, bytes_of(tmp_path / name).values())) == size * 100_000  # whole files, each once
    assert found['one'] < found['two']


# ---- packages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A standard library and packages of a few files each in place of the real ones; returns the names asked for."""
    library, place, asked = tmp_path / 'lib', tmp_path / 'lib' / 'site-packages', []
    write(library, {f'std{n}.py': f'standard = {n}\n' * 5 for n in range(20)})
    write(library, {'json/tool.py': 'tool = 1\n', 'dist-packages/d.py': 'dist = 1\n', 'site-packages/p.py': 'p = 1\n'})

    def distribution(name):
        if name == 'missing':
            raise importlib.metadata.PackageNotFoundError(name)
        asked.append(name)
        names = [f'{name}/b.py', f'{name}/a.py', f'{name}/x.so', f'{name}/gone.py', f'{name}/__pycache__/a.pyc']
        write(place, {path: f'# {path}\n' * 5 for path in names if 'gone' not in path})
        return types.SimpleNamespace(
            version='1.2', files=list(map(importlib.metadata.PackagePath, names)), locate_file=place.joinpath
        )

    monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(library))
    monkeypatch.setattr(importlib.metadata, 'distribution', distribution)
    return asked


def test_the_standard_library_and_every_pin_by_default(prepare, installation, tmp_path):
    out, _ = prepare(CODE, out_dir=tmp_path / 'out', val_fraction=0.4)
    pins = re.findall(r'^([\w-]+)==', (ROOT / 'requirements.txt').read_text(), re.MULTILINE)
    assert sorted(installation) == sorted(pins) and len(pins) >= 10
    meta = TokenData(tmp_path / 'out', 8).meta
    assert set(meta['packages']) == {'stdlib', *pins}
    assert meta['packages']['stdlib']['files'] == 21 and meta['packages']['torch'] == {
        'version': '1.2', 'files': 2, 'bytes': 5 * len('# torch/a.py\n# torch/b.py\n')}  # fmt: skip
    assert f'{21 + 2 * len(pins)} .py files of stdlib {platform.python_version()}, ' in meta['source']
    for data in bytes_of(tmp_path / 'out').values():
        order = list(dict.fromkeys(re.findall(r'# (\S+/[ab]\.py)', data.decode())))
        assert order == sorted(order) and len(order) > 5  # whatever the order of their records
    text = b''.join(bytes_of(tmp_path / 'out').values()).decode()
    assert 'torch/a.py' in text and 'dist =' not in text and 'p = 1' not in text and '.so' not in text


def test_chosen_packages_in_any_order(prepare, installation, tmp_path):
    prepare(CODE, packages='stdlib,numpy', out_dir=tmp_path / 'a', val_fraction=0.4)
    prepare(CODE, packages='numpy, stdlib,numpy', out_dir=tmp_path / 'b', val_fraction=0.4)
    assert bytes_of(tmp_path / 'a') == bytes_of(tmp_path / 'b')
    meta = TokenData(tmp_path / 'a', 8).meta
    assert list(meta['packages']) == ['stdlib', 'numpy'] and meta['source'].endswith(' and numpy 1.2')


def test_real_packages(prepare, tmp_path):
    """Their text is that of the installed files."""
    out, _ = prepare(CODE, packages='tqdm,safetensors', out_dir=tmp_path / 'out', val_fraction=0.3)
    meta = TokenData(tmp_path / 'out', 64).meta
    sizes = {}
    for name in ('tqdm', 'safetensors'):
        paths = [file.locate() for file in importlib.metadata.files(name) if file.suffix == '.py']
        texts = {Path(path).read_bytes() for path in paths} - {b''}
        assert meta['packages'][name] == {'version': importlib.metadata.version(name), 'files': len(texts),
                                          'bytes': sum(map(len, texts))}  # fmt: skip
        sizes[name] = len(texts)
    assert f'{sum(sizes.values())} .py files of tqdm' in out


# ---- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('tokenizer', ['char', 'bpe', 'gpt2'])
def test_every_tokenizer_keeps_all_of_the_text(tokenizer, prepare, sources, tmp_path, request):
    if tokenizer == 'gpt2':
        request.getfixturevalue('gpt2_cache')
    rare = {f'table{n}.py': ''.join(map(chr, range(0x4E00 + 100 * n, 0x4E64 + 100 * n))) + '\n' for n in range(4)}
    write(tmp_path / 'in', {**sources, **rare})
    keys = dict(input=tmp_path / 'in', tokenizer=tokenizer, val_fraction=0.3)
    _, err = prepare(CODE, out_dir=tmp_path / 'out', **keys, **({'vocab_size': 300} if tokenizer == 'bpe' else {}))
    meta = TokenData(tmp_path / 'out', 8).meta
    encoder, texts = load_tokenizer(meta), {**sources, **rare}
    found = {split: encoder.decode(ids_of(tmp_path / 'out', split)) for split in ('train', 'val')}
    if tokenizer == 'char':
        assert len(meta['chars']) > 400 and f'each of {len(meta["chars"])} different characters' in err
        assert len(found['train'] + found['val']) == sum(map(len, texts.values()))
        assert all((text in found['train']) != (text in found['val']) for text in texts.values())
    else:
        documents = {split: text.split('<|endoftext|>') for split, text in found.items()}
        assert documents['train'].pop() == documents['val'].pop() == ''
        assert sorted(documents['train'] + documents['val']) == sorted(texts.values())
    if tokenizer == 'bpe':
        assert meta['pieces'] == BPETokenizer.learn(documents['train'], 300).pieces  # the validation split is unknown


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    'both': (dict(packages='numpy'), '--input and --packages were both given'),
    'not installed': (dict(input='', packages='missing'), 'the package missing is not installed: run pip install'),
    'no packages': (dict(input='', packages=','), 'names nothing'),
    'missing': (dict(input='nowhere'), 'there is no file or folder nowhere'),
    'no such files': (dict(suffixes='.c,.h'), r'there are no .c,.h files in .* \(only 60 .py\)'),
    'no such files in packages': (dict(input='', packages='numpy', suffixes='.c'), 'no text in the .c files of numpy'),
    'empty': (dict(input='empty.py'), 'there is no text in'),
    'one file': (dict(input='one.py'), 'none of 1 files is in the val split: choose another --split_seed'),
    'too large': (dict(input='large.py', megabytes=1), 'no file is as small as 1 MB'),
    'tokenizer': (dict(tokenizer='words'), 'must be char, byte, bpe or gpt2'),
    'vocab_size': (dict(vocab_size=300), 'requires --tokenizer=bpe'),
    'name': (dict(name='../other'), 'plain folder name'),
    'megabytes': (dict(megabytes=-1), 'megabytes is -1; it must be at least 0'),
    'own output': (dict(input='data/tiny/meta.json'), 'would be overwritten'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_arguments_change_nothing(case, prepare, sources, installation, char_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {'empty.py': '', 'one.py': 'x = 1\n' * 50, 'large.py': 'x = 1\n' * 200_000})
    write(tmp_path / 'in', sources)
    keys, message = BAD[case]
    before = files_of(char_data)
    with pytest.raises(UserError, match=message) as error:
        prepare(CODE, **{'input': tmp_path / 'in', 'out_dir': char_data, **keys})
    assert '\n' not in str(error.value) and files_of(char_data) == before
