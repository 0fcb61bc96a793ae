"""
Run a script with the variants of studies/variants.py as further values of --attention.

$ python studies/with_variants.py train.py config/train_repeats_mla.py --attention=mla_slice --pos=rope
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.errors import UserError
from studies import variants

if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
    raise UserError('name a script and its arguments: python studies/with_variants.py train.py --attention=mla_slice')
variants.register()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
