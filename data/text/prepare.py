"""
Prepare any text: files or folders in, train.bin, val.bin and meta.json out, in data/NAME.

A novel in characters, and training on it:
$ python data/text/prepare.py --input=novel.txt --name=novel
$ python train.py config/train_shakespeare_char.py --dataset=novel --out_dir=out-novel

All .txt and .md files of a folder, and one more file, in GPT-2's tokens:
$ python data/text/prepare.py --input=notes,diary.txt --name=notes --tokenizer=gpt2

In a byte-pair encoding learned from the text, for small models, whose output head GPT-2's 50,257 ids would dominate:
$ python data/text/prepare.py --input=notes --name=notes --tokenizer=bpe --vocab_size=2048

A compressed file with one document per line:
$ python data/text/prepare.py --input=reviews.txt.gz --name=reviews --tokenizer=gpt2 --documents=line

Notable features:
- any size: the text streams through all cores in bounded memory; the ids equal those of encoding each file at once
- text is UTF-8 whatever the locale; byte order marks are dropped, \\r\\n becomes \\n (byte: the bytes are unchanged)
- files are read in the order of their paths; the end of the text is the validation split
- gpt2 and bpe insert <|endoftext|> after each document; char and byte have no such token and concatenate the files
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import time

from core.cli.errors import UserError, output
from core.cli.files import sha256
from core.cli.ranges import listed
from core.convert.hf_tokenizer import kind_to_prepare
from core.text import text_files
from core.text.tokenizer import TOKENIZERS
from core.text.write_dataset import encode_stream, summary, write_dataset

# ----------------------------------------------------------------------------------------------------------------------
input = ''  # a file or a folder, or several, separated by commas
name = 'text'  # the data set is written to data/NAME; train with --dataset=NAME
out_dir = ''  # write to this folder instead of data/NAME
tokenizer = 'char'  # char, byte, bpe, gpt2 or a folder with a tokenizer.json
vocab_size = 0  # bpe: number of ids; 0: 4096
documents = 'file'  # gpt2, bpe: a document is a file or a line
suffixes = '.txt,.md,.txt.gz'  # which files of a folder to read
val_fraction = 0.1  # fraction of the text in the validation split
workers = 0  # threads; 0: all cores
# ----------------------------------------------------------------------------------------------------------------------
exec(open(Path(__file__).resolve().parents[2] / 'configurator.py', encoding='utf-8').read())

kind = kind_to_prepare(tokenizer, vocab_size)
if documents == 'line' and not kind.byte_pair:
    divided = [each.name for each in TOKENIZERS.values() if each.byte_pair]
    raise UserError(f'--documents=line requires --tokenizer={listed(divided)}: the others have no end-of-text token')
folder = text_files.output_folder(Path(__file__).resolve().parents[1], name, out_dir)
files, copies = text_files.input_files(input, suffixes)
text_files.check_not_overwritten(files, folder)

texts = text_files.TextFiles(files, kind, documents)
if texts.total < 2:
    raise UserError(f'there is no text in {input}; set another file or folder with --input')
cut = min(max(1, int(texts.total * (1 - val_fraction))), texts.total - 1)
encoder = text_files.learn(kind, texts.characters, texts.pieces(0, cut), cut, vocab_size)
source = f'file {files[0].name}' if len(files) == 1 else f'{len(files):,} files of {text_files.named(input)}'
if len(files) == len(copies):
    source = 'text from a pipe'

start = time.perf_counter()
with text_files.encoding_bar(kind, texts.total) as bar:
    ranges = {'train': (0, cut), 'val': (cut, texts.total)}
    splits = {split: encode_stream(encoder, texts.pieces(*ends), workers, bar) for split, ends in ranges.items()}
    checksum = text_files.joint_checksum([sha256(path) for path in files])
    meta = write_dataset(folder, encoder, splits, source=source, input_sha256=checksum, least=text_files.LEAST)
output(summary(folder, meta, time.perf_counter() - start))
