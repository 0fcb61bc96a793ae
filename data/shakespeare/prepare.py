"""
Prepare Shakespeare in GPT-2's tokens, for fine-tuning GPT-2: data/shakespeare_char/prepare.py with another tokenizer.

$ python data/shakespeare/prepare.py
$ python data/shakespeare/prepare.py --input=FILE

tiktoken downloads GPT-2's vocabulary once; without a network, set TIKTOKEN_CACHE_DIR to a copy of its cache.
"""

import runpy
import sys
from pathlib import Path

if {'-h', '--help'} & set(sys.argv):
    print(__doc__)
here = Path(__file__).resolve().parent
sys.argv[1:1] = ['--tokenizer=gpt2', f'--out_dir={here}']
runpy.run_path(str(here.parent / 'shakespeare_char' / 'prepare.py'), run_name='__main__')
