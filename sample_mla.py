"""
Generate text with a GPT with multi-head latent attention: sample.py, with train_mla.py's out_dir as the default.

$ python sample_mla.py --start="ROMEO:" --num_samples=3
"""

import os
import runpy
import sys

if {'-h', '--help'} & set(sys.argv):
    print(__doc__)
sys.argv[1:1] = ['--out_dir=out-mla']
runpy.run_path(os.path.join(os.path.dirname(__file__), 'sample.py'), run_name='__main__')
