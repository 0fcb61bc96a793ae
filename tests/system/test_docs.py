"""docs/mla.md: its code runs from top to bottom and prints what the page says; it stays short."""

import re

import pytest
from support import forking
from support.keys import ROOT

TEXT = (ROOT / 'docs' / 'mla.md').read_text(encoding='utf-8')


def test_the_code_prints_what_the_page_says():
    pytest.importorskip('transformers')
    code = ''.join(re.findall(r'```python\n(.*?)```', TEXT, flags=re.DOTALL))
    done = forking.run('-c', [code], 300)
    assert done.returncode == 0, done.stderr[-1500:]
    promised = re.findall(r'^ *print\(.*\)  # (.*)$', code, flags=re.MULTILINE)
    assert done.stdout.splitlines() == promised and len(promised) == code.count('print(')


def test_it_is_one_sitting():
    assert len(TEXT.split()) <= 1500
