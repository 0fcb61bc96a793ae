"""
Prepare Shakespeare by characters: train.bin, val.bin and meta.json in this folder; 90 % of the text is for training.

Download tinyshakespeare (1.1 MB, once), or use the copy input.txt in this folder:
$ python data/shakespeare_char/prepare.py

Use a local copy, or any other text:
$ python data/shakespeare_char/prepare.py --input=FILE

Without a network a generated stand-in takes its place, with a warning; meta.json says which corpus it is.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import corpus

from core import tokenizer, write_dataset
from core.runtime import UserError

# ----------------------------------------------------------------------------------------------------------------------
input = ''  # a text file; '' = tinyshakespeare: input.txt in this folder, else from the network, else the stand-in
download = True  # False: do not try the network
out_dir = ''  # where the data set goes; '' = this folder
# ----------------------------------------------------------------------------------------------------------------------
exec(open(Path(__file__).resolve().parents[2] / 'configurator.py', encoding='utf-8').read())

here = Path(__file__).resolve().parent
text, source, checksum = corpus.find(input, [here, here.parent / 'shakespeare'], download)
if len(text) < 2:
    raise UserError(f'{source} is empty; give a text with --input=FILE')
cut = min(int(len(text) * 0.9), len(text) - 1)
chars = ''.join(sorted(set(text)))

start = time.perf_counter()
tokenizer = tokenizer.CharTokenizer(chars)
splits = {'train': tokenizer.encode_array(text[:cut]), 'val': tokenizer.encode_array(text[cut:])}
seconds = time.perf_counter() - start
folder = Path(out_dir or here)
meta = write_dataset.write_dataset(folder, 'char', splits, chars=chars, source=source, input_sha256=checksum)
print(write_dataset.summary(folder, meta, seconds))
