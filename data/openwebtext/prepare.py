"""
Prepare OpenWebText (8 million web pages, 9 billion GPT-2 tokens): data/hub/prepare.py with nanoGPT's settings.

Stream it from the Hugging Face Hub and tokenize it on all cores:
$ python data/openwebtext/prepare.py

The same command resumes a stopped run. Use local Parquet files with a column `text`:
$ python data/openwebtext/prepare.py --input=FOLDER

Requires about 25 GB of download, which isn't kept, and 17 GB for train.bin. The validation documents are those of
nanoGPT's script (0.05%, seed 2357), in the order of the data set; every document ends with <|endoftext|>.
"""

import runpy
import sys
from pathlib import Path

if {'-h', '--help'} & set(sys.argv):
    print(__doc__)
here = Path(__file__).resolve().parent
local = any(argument.partition('=')[0] == '--input' for argument in sys.argv)
source = ['--suffixes=.parquet'] if local else ['--hub=Skylion007/openwebtext']
sys.argv[1:1] = [*source, f'--out_dir={here}', '--shard_tokens=0', '--split_seed=2357', '--drawn_from=8013769']
runpy.run_path(str(here.parent / 'hub' / 'prepare.py'), run_name='__main__')
