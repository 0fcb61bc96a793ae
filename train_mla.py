"""
Train a GPT with multi-head latent attention: train.py's own loop, with MLA's defaults ahead of the arguments.

$ python train_mla.py config/train_shakespeare_char_mla.py
$ torchrun --standalone --nproc_per_node=8 train_mla.py config/train_gpt2_mla.py
"""

import os
import runpy
import sys

if {'-h', '--help'} & set(sys.argv):
    print(__doc__)
sys.argv[1:1] = ['--attention=mla', '--out_dir=out-mla']
runpy.run_path(os.path.join(os.path.dirname(__file__), 'train.py'), run_name='__main__')
