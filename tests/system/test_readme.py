"""README.md and docs/mla.md: every command runs as it is written, one after the other, only shorter; it is short."""

import re
import shlex
import shutil

import pytest
from support import forking
from support.keys import ROOT
from support.training import write_characters

TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
# how each script is made short; a command's own flags come before these
TRAIN = '--max_iters=2 --eval_interval=2 --eval_iters=1 --batch_size=2 --device=cpu --threads=1 --log_interval=1'
SHORT = {
    'train.py': TRAIN,
    'train_mla.py': TRAIN,
    'test_shakespeare_quick.py': f'{TRAIN} --size=cpu --sample_tokens=4',
    'compare.py': '--windows=4 --sample_tokens=4 --threads=1 --device=cpu',
    'sample.py': '--max_new_tokens=4 --device=cpu',
    'sample_mla.py': '--max_new_tokens=4 --device=cpu',
    'convert_mla.py': '--eval_tokens=256 --statistics_tokens=256 --device=cpu --overwrite=True',
    'find_induction_heads.py': '--sequences=8 --controls=1 --resamples=100 --ablate_sequences=1 --device=cpu',
    'data/code/prepare.py': '--megabytes=1 --vocab_size=300 --packages=tqdm',
    'data/repeats/prepare.py': '--rows=64 --val_rows=16',
    'sizing.py': '--n_kv_heads=12 --n_latents=384',
}
NOT_HERE = ('make ', 'python3 -m venv', 'pip ', 'transformers serve')  # install, serve, or run these very tests


def commands():
    """The shell commands of README.md and docs/mla.md in order."""
    text = TEXT + (ROOT / 'docs' / 'mla.md').read_text(encoding='utf-8')
    blocks = re.findall(r'```sh\n(.*?)```', text, flags=re.DOTALL)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    return [line.split('  #')[0].strip() for line in lines if line.strip()]


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """A copy of the repository's files with a tiny tinyshakespeare."""
    folder = tmp_path_factory.mktemp('clone') / 'repository'
    ignored = shutil.ignore_patterns('.*', 'out*', 'hf-*', '*.bin', 'input.txt', '__pycache__', 'tests', 'wandb')
    shutil.copytree(ROOT, folder, ignore=ignored)
    text = 'ROMEO: the cat sat on the mat;\n a rat sat on that. ' * 200
    write_characters(folder / 'data' / 'shakespeare_char', 7000, text=text)
    return folder


@pytest.mark.slow
def test_every_command_runs(clone):
    ran = []
    for command in commands():
        if command.startswith(NOT_HERE) or any(name in command for name in ('shakespeare_char/prepare.py', 'smollm2')):
            continue
        words = shlex.split(command)
        script = next(word for word in words if word.endswith('.py'))
        own = words[words.index(script) + 1 :]
        arguments = [*own, *SHORT.get(script, '').split()]
        if '--resume=yes' in own:
            arguments = [*own, '--max_iters=3']
        if words[0] == 'torchrun':
            launcher = ['torch.distributed.run', *words[1 : words.index(script)]]
            done = forking.run('-m', [*launcher, script, *arguments], 300, root=clone)
        else:
            done = forking.run(script, arguments, 300, root=clone)
        assert done.returncode == 0, f'{command}\n{done.stdout[-300:]}\n{done.stderr[-1500:]}'
        ran.append(script)
    assert set(SHORT) <= set(ran) and len(ran) > 20


@pytest.mark.slow
def test_the_example_in_python_generates(clone):
    """After the commands above: it loads the folder that one of them exports."""
    pytest.importorskip('transformers')
    code = re.search(r'```python\n(.*?)```', TEXT, flags=re.DOTALL).group(1)
    code = code.replace('max_new_tokens=50', 'max_new_tokens=4')
    done = forking.run('-c', [code], 300, root=clone)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.startswith('ROMEO:') and len(done.stdout) > 7


def test_it_can_be_read_in_five_minutes():
    assert len(TEXT.split()) <= 1500
    assert len([line for line in TEXT.splitlines() if line.startswith('|')]) <= 40


PAGES = (
    *('README.md', 'BENCHMARKS.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'docs/cluster.md', 'docs/style.md'),
    *('models/README.md', *(f'results/{path.name}' for path in sorted((ROOT / 'results').glob('*.md')))),
    *('docs/troubleshooting.md', 'docs/mla.md', 'config/README.md', 'data/README.md', 'tests/README.md'),
)


@pytest.mark.parametrize('page', PAGES)
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    for target in re.findall(r'\]\(([^)#]+)[^)]*\)', text):
        if '://' not in target:
            assert ((ROOT / page).parent / target).exists(), target
