"""models/: the two models that come with the repository are those of their card, and do what README says of them."""

import hashlib
import re

import pytest
from support import ROOT, forking

FILES = sorted((ROOT / 'models').glob('*/ckpt.pt'))


def test_the_card_names_every_file_by_its_checksum():
    card = (ROOT / 'models' / 'README.md').read_text(encoding='utf-8')
    found = dict(re.findall(r'`(\S+/ckpt\.pt)`.*\| ([0-9a-f]{64}) \|', card))
    assert found == {f'{p.parent.name}/{p.name}': hashlib.sha256(p.read_bytes()).hexdigest() for p in FILES}
    assert len(found) == 2 and sum(path.stat().st_size for path in FILES) < 1_000_000


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.parent.name)
def test_they_continue_a_repeated_sequence_of_ids(file):
    keys = (f'--out_dir={file.parent}', '--num_samples=1', '--max_new_tokens=9', '--temperature=0', '--device=cpu')
    done = forking.run('sample.py', (*keys, '--start=5 9 71 3 40 8 96 22 17 5 9 71 3'))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split('\n')[0].split()[13:] == ['40', '8', '96', '22', '17', '5', '9', '71', '3']


def test_without_a_prompt_they_begin_with_id_0():
    keys = (f'--out_dir={FILES[0].parent}', '--num_samples=1', '--max_new_tokens=3', '--device=cpu')
    done = forking.run('sample.py', keys)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r'0( \d+){3} \n-+\n', done.stdout) and '5 9 5' in done.stderr
