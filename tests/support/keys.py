"""Which scripts there are and which keys they have."""

from core.cli.keys import keys_of  # noqa: F401  (for the tests)
from support import ROOT

SCRIPTS = [p for pattern in ('*.py', 'studies/*.py', 'data/*/prepare.py') for p in sorted(ROOT.glob(pattern))
           if 'configurator.py' in p.read_text() and p.name != 'configurator.py']  # fmt: skip
