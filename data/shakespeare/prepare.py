"""
Prepare Shakespeare in GPT-2's tokens, for fine-tuning GPT-2: train.bin, val.bin and meta.json in this folder.

Download tinyshakespeare (1.1 MB, once), or use a copy named input.txt in this folder or in data/shakespeare_char:
$ python data/shakespeare/prepare.py

Use a local copy, or any other text:
$ python data/shakespeare/prepare.py --input=FILE

tiktoken downloads GPT-2's vocabulary once; without a network, set TIKTOKEN_CACHE_DIR to a copy of its cache.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'shakespeare_char'))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from core.cli import signals

signals.exit_at_once()  # for the time of the slow imports

import time

import corpus

from core.cli.arguments import check_folder
from core.cli.errors import output
from core.text.tokenizer import GPT2Tokenizer
from core.text.write_dataset import summary, write_dataset

# ----------------------------------------------------------------------------------------------------------------------
input = ''  # a text file; '': tinyshakespeare from a local input.txt, else downloaded, else plays
download = True  # False: never use the network
out_dir = ''  # where the data set is written; '': this folder
# ----------------------------------------------------------------------------------------------------------------------
exec(open(Path(__file__).resolve().parents[2] / 'configurator.py', encoding='utf-8').read())

here = Path(__file__).resolve().parent
folder = Path(out_dir or here)
check_folder(str(folder))
tokenizer = GPT2Tokenizer().load()
text, source, checksum = corpus.find(input, [here, here.parent / 'shakespeare_char'], download)
cut = int(len(text) * 0.9)

start = time.perf_counter()
splits = {'train': tokenizer.encode_array(text[:cut]), 'val': tokenizer.encode_array(text[cut:])}
seconds = time.perf_counter() - start
meta = write_dataset(folder, tokenizer, splits, source=source, input_sha256=checksum)
output(summary(folder, meta, seconds))
