"""
What a user can get wrong, as a table: each case ends in one line on stderr that names the fault and the remedy, with
exit code 2, without a traceback, and with every file as it was.
"""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import forking
import pytest
import torch
from bad_input import (
    CPU,
    PROOF,
    ROOT,
    SMALL,
    Payload,
    ckpt,
    cut,
    folder,
    make_place,
    meta,
    nanogpt_meta,
    remove,
    snapshot,
    write,
)

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')


@pytest.fixture(scope='module')
def pattern_place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('place')
    make_place(folder)
    return folder


@pytest.fixture
def place(pattern_place, tmp_path):
    return shutil.copytree(pattern_place, tmp_path / 'place')


# ---- the table -------------------------------------------------------------------------------------------------------
class Case(NamedTuple):
    """What is typed, what the line must name as the fault and as the remedy (regular expressions), and what is broken.

    {place} in an argument stands for the folder that make_place made; scripts get working arguments before these.
    """

    script: str
    arguments: str
    fault: str
    remedy: str
    damage: object = None


ARGUMENTS = {
    'train.py': {'out_dir': '{place}/out', 'data_dir': '{place}/data', 'dataset': 'tiny', **SMALL, **CPU},
    'sample.py': {'out_dir': '{place}/mha', 'data_dir': '{place}/data', 'start': 'a', 'max_new_tokens': 2, **CPU},
    'convert_mla.py': {'source': '{place}/mha', 'out_dir': '{place}/out', 'data_dir': '{place}/data', **CPU},
    'export_hf.py': {'source': '{place}/mha', 'out_dir': '{place}/out'},
    'find_induction_heads.py': {'models': '{place}/mha', 'out_dir': '{place}/out', 'data_dir': '{place}/data', **CPU},
    'test_shakespeare_quick.py': {'out_dir': '{place}/out', 'data_dir': '{place}/data', 'dataset': 'tiny',
                                  'max_iters': 1, **CPU},
    'studies/induction.py': {'out_dir': '{place}/out', 'data_dir': '{place}/data'},
    'studies/mla.py': {'out_dir': '{place}/out', 'figure': '{place}/out.png', 'data_dir': '{place}/data'},
    'data/text/prepare.py': {'out_dir': '{place}/out', 'input': '{place}/prompt.txt'},
    'data/shakespeare_char/prepare.py': {'out_dir': '{place}/out', 'input': '{place}/prompt.txt'},
    'data/shakespeare/prepare.py': {'out_dir': '{place}/out', 'input': '{place}/prompt.txt'},
    'data/openwebtext/prepare.py': {'out_dir': '{place}/out'},
    'data/repeats/prepare.py': {'folder': '{place}/out', 'rows': 8, 'val_rows': 8},
}  # fmt: skip
ARGUMENTS['train_mla.py'] = ARGUMENTS['train.py']
ARGUMENTS['sample_mla.py'] = {**ARGUMENTS['sample.py'], 'out_dir': '{place}/mla'}

T, TM, S, C, E, F = 'train.py', 'train_mla.py', 'sample.py', 'convert_mla.py', 'export_hf.py', 'find_induction_heads.py'
Q, STUDY, STUDY_MLA = 'test_shakespeare_quick.py', 'studies/induction.py', 'studies/mla.py'
TEXT, CHAR, GPT2, WEB, REPEATS = (
    f'data/{name}/prepare.py' for name in ('text', 'shakespeare_char', 'shakespeare', 'openwebtext', 'repeats')
)
RESUME = '--init_from=resume --out_dir={place}/mha'
RESUME_MLA = '--init_from=resume --out_dir={place}/mla'
PREPARE = r'data/text/prepare\.py'  # the remedy for most of what is wrong with data

FLAGS = [
    Case(T, '--batchsize=3', 'unknown key --batchsize', r'did you mean --batch_size\?'),
    Case(T, '--learning-rate=3', 'unknown key --learning-rate', r'did you mean --learning_rate\?'),
    Case(TM, '--nlatent=3', 'unknown key --nlatent', r'did you mean --n_latent'),
    Case(S, '--temprature=1', 'unknown key --temprature', r'did you mean --temperature\?'),
    Case(S, '--n_layer=1', 'unknown key --n_layer', '--help'),
    Case(T, '--qqqq=3', 'unknown key --qqqq', '--help'),
    Case(T, '-x', "unknown option '-x'", '--key=value'),
    Case(T, 'batch_size=3', "unexpected argument 'batch_size=3'", r'did you mean --batch_size=3\?'),
    Case(T, '--max_iters', '--max_iters needs a value', '--max_iters=600000'),
    Case(T, '--batch_size=many', "got 'many'", 'whole number'),
    Case(T, '--batch_size=2.5', 'got 2.5', 'whole number'),
    Case(T, '--dropout=false', "got 'false'", 'a number'),
    Case(T, '--learning_rate=nan', 'got nan', 'a number'),
    Case(T, '--eval_only=maybe', "got 'maybe'", 'True or False'),
    Case(S, '--use_cache=2', "got '2'", 'True or False'),
    Case(T, '--attention=gqa', "attention is 'gqa'", 'mha or mla'),
    Case(T, '--compile=maybe', "compile is 'maybe'", 'auto, True or False'),
    Case(T, '--device=tpu', "device 'tpu'", '--device=cpu'),
    Case(T, '--device=cuda:77', "device 'cuda:77'", '--device=cpu'),
    Case(S, '--device=gpu', "device 'gpu'", '--device=cpu'),
    Case(T, '--dtype=int8', "dtype is 'int8'", 'bfloat16'),
    Case(T, '--dtype=float16', 'float16 needs a CUDA GPU', '--dtype=bfloat16'),
    Case(S, '--dtype=half', "dtype is 'half'", 'float16'),
    Case(T, '--pos=absolute', "pos is 'absolute'", 'learned or rope'),
    Case(T, '--init_from=gpt3', "'gpt3' is no checkpoint", 'no folder and none of gpt2, gpt2-medium.*name one of them'),
    Case(T, '--init_from=gpt2', "'gpt2' can't be loaded", 'check the name, the folder and the network'),
    Case(T, '--init_from={place}/nowhere', 'nowhere', 'gpt2'),
    Case(S, '--init_from=gpt3', "'gpt3' is no checkpoint", 'name one of them'),
    Case(T, '--batch_size=0', 'batch_size', 'at least 1'),
    Case(T, '--block_size=-1', 'block_size', 'at least 1'),
    Case(T, '--gradient_accumulation_steps=0', 'gradient_accumulation_steps', 'at least 1'),
    Case(T, '--eval_iters=0', 'eval_', 'at least 1'),
    Case(T, '--log_interval=0', 'log_', 'at least 1'),
    Case(T, '--max_iters=-1', 'max_iters', 'at least 0'),
    Case(T, '--warmup_iters=-5', 'warmup_iters', 'at least 0'),
    Case(T, '--checkpoint_interval=-1', 'checkpoint_interval', 'at least 0'),
    Case(T, '--seed=-1', 'seed', 'at least 0'),
    Case(T, '--threads=-1', 'threads', 'at least 0'),
    Case(T, '--threads=100000', 'threads is 100000', 'at most 1,024'),
    Case(T, '--n_embd=1e14', 'n_embd is 1', 'at most 65,536'),
    Case(S, '--num_samples=1e15', 'num_samples is 1', 'at most 100,000'),
    Case(S, '--seed=1e30', 'seed', 'at most 9,223'),
    Case(REPEATS, '--seed=-1', 'seed', 'at least 0'),
    Case(T, '--learning_rate=0', 'learning_rate is 0', 'above 0'),
    Case(T, '--learning_rate=inf', 'learning_rate is inf', 'finite'),
    Case(T, '--min_lr=-1', 'min_lr is -1', 'at least 0'),
    Case(T, '--beta2=1', 'beta2 is 1', 'below 1'),
    Case(T, '--grad_clip=-1', 'grad_clip', 'at least 0'),
    Case(T, '--weight_decay=-1', 'weight_decay', 'at least 0'),
    Case(T, '--weight_decay=inf', 'weight_decay is inf', 'finite'),
    Case(T, '--dropout=1', 'dropout is 1', 'below 1'),
    Case(T, '--n_layer=0', 'n_layer is 0', 'at least 1'),
    Case(T, '--n_head=3', 'n_embd=8 must be a multiple of n_head=3', 'equal size'),
    Case(T, '--n_embd=6 --pos=rope', 'RoPE.* 3', 'even'),
    Case(T, '--n_latent=4', 'belong to MLA', 'train_mla.py'),
    Case(T, '--latent_norm=True', 'belong to MLA', 'train_mla.py'),
    Case(TM, '--n_latent=-4', 'n_latent is -4', 'at least 0'),
    Case(TM, '--n_latent_q=-4', 'n_latent_q is -4', 'at least 0'),
    Case(TM, '--n_rope=2', 'n_rope', 'pos=.?rope'),
    Case(TM, '--n_rope=3 --pos=rope', '3', 'even'),
    Case(T, '--overwrite=True --init_from=resume --out_dir={place}/mha', 'overwrite.* resume', 'choose one'),
    Case(T, '--out_dir=', 'out_dir', '--out_dir'),
    Case(T, '--out_dir={place}/prompt.txt', r'prompt\.txt', '--out_dir'),
    Case(T, '--out_dir={place}/prompt.txt/deeper', r'prompt\.txt', '--out_dir'),
    Case(T, '--out_dir={place}/mha', 'holds another run', '--resume=yes.*--out_dir.*--overwrite=True'),
    Case(S, '--num_samples=0', 'num_samples', 'at least 1'),
    Case(S, '--max_new_tokens=0', 'max_new_tokens', 'at least 1'),
    Case(S, '--temperature=-1', 'temperature is -1', 'at least 0'),
    Case(S, '--top_k=-1', 'top_k is -1', 'at least 0'),
    Case(S, '--top_p=1.5', 'top_p is 1.5', 'at most 1'),
    Case(S, '--top_p=0', 'top_p is 0', 'above 0'),
    Case(C, '--method=magic', "method is 'magic'", 'data or weights'),
    Case(C, '--sweep=8,many', "sweep is '8,many'", 'separated by commas'),
    Case(C, '--eval_tokens=0', 'eval_tokens', 'at least 2'),
    Case(C, '--n_latent=99', 'n_latent.*99', 'at most|n_embd|1 to'),
    Case(C, '--n_latent=-1', '-1', 'at least|1 to'),
    Case(C, '--source={place}/mla', 'MLA', 'MHA|multi-head|GPT'),
    Case(C, '--source=gpt5', "'gpt5' is no checkpoint", 'name one of them'),
    Case(C, '--out_dir={place}/mla', r'ckpt\.pt exists', '--overwrite=True'),
    Case(C, '--dataset=wide', '256 different tokens', 'data set that the model was made for'),
    Case(C, '--out_dir={place}/prompt.txt', r'prompt\.txt', '--out_dir'),
    Case(C, '--json={place}/nowhere/x.json', r'nowhere/x\.json', '--json'),
    Case(E, '--out_dir={place}/mla', 'is not empty', '--overwrite=True'),
    Case(E, '--out_dir={place}/prompt.txt', r'prompt\.txt', '--out_dir'),
    Case(F, '--models=', 'models', '--models'),
    Case(F, '--models={place}/nowhere', 'nowhere', 'train a model first|--models'),
    Case(F, '--models={place}/mha', 'initial values|untrained|iteration', 'train it first',
         ckpt(lambda c: c.update(iter_num=0))),
    Case(F, '--sequences=0', 'sequences', 'at least'),
    Case(F, '--length=0', 'length', 'at least'),
    Case(F, '--out_dir={place}/prompt.txt', r'prompt\.txt', '--out_dir'),
    Case(Q, '--size=tpu', "size is 'tpu'", 'auto'),
    Case(Q, '--max_iters=-1', 'max_iters', 'negative|at least'),
    Case(Q, '--sample_tokens=0', 'sample_tokens', 'at least 1'),
    Case(Q, '--dataset=nowhere', 'no data set', PREPARE),
    Case(Q, '--size=cpu --start=a --out_dir={place}/both', 'another', '--out_dir.*--overwrite=True',
         lambda place: shutil.copytree(place / 'mha', place / 'both' / 'mha')),
    Case(STUDY, '--seeds=-1', 'seeds', 'negative|at least'),
    Case(STUDY_MLA, '--seeds=0', 'seeds', 'at least 1'),
    Case(TEXT, '--input=', 'say what to prepare', '--input=FILE'),
    Case(TEXT, '--input={place}/nowhere.txt', r'nowhere\.txt', '--input'),
    Case(TEXT, '--tokenizer=words', 'words', 'char, byte, bpe (or|and) gpt2'),
    Case(TEXT, '--tokenizer=bpe --vocab_size=256', 'vocab_size=256', 'from 300'),
    Case(TEXT, '--tokenizer=char --vocab_size=500', 'vocab_size', '--tokenizer=bpe'),
    Case(TEXT, '--val_fraction=2', 'val_fraction', 'between|below|0 and 1'),
    Case(TEXT, '--documents=word', 'word', 'file.* line'),
    Case(TEXT, '', r'no text in .*prompt\.txt', '--input', write('prompt.txt', '')),
    Case(TEXT, '', 'UTF-8', 'prompt.txt', write('prompt.txt', b'caf\xe9 au lait')),
    Case(CHAR, '--input={place}/nowhere.txt', r'nowhere\.txt', '--input'),
    Case(CHAR, '', 'empty', '--input=FILE', write('prompt.txt', '')),
    Case(GPT2, '', 'GPT-2', 'TIKTOKEN_CACHE_DIR|--input'),
    Case(WEB, '--input={place}/nowhere', 'no Parquet file', '--input'),
    Case(REPEATS, '--min_period=1', 'min_period', '2 to half'),
    Case(REPEATS, '--vocab_size=-1', 'vocab_size', 'at least 0'),
]  # fmt: skip

CONFIG = '{place}/config.py'
CONFIGS = [
    Case(T, '{place}/nowhere.py', r"nowhere\.py' does not exist", 'config/'),
    Case(T, 'config/train_shakespear_char.py', 'does not exist', r'did you mean config/train_shakespeare_char\.py\?'),
    Case(T, 'config/train_gpt2', "unexpected argument 'config/train_gpt2'", r'did you mean config/train_gpt2\.py\?'),
    Case(T, CONFIG, r'config\.py:2: SyntaxError', r'config\.py:2', write('config.py', 'max_iters = 1\nseed = = 3\n')),
    Case(T, CONFIG, r'config\.py:2: unknown key max_iter:', r'did you mean --max_iters\?',
         write('config.py', 'seed = 1\nmax_iter = 1\n')),
    Case(T, CONFIG, r"config\.py:1: max_iters .* got 'ten'", 'whole number', write('config.py', 'max_iters = "ten"\n')),
    Case(T, CONFIG, r'config\.py:1: compile .* got 1', 'True or False', write('config.py', 'compile = 1\n')),
    Case(T, CONFIG, r'config\.py:1: out_dir .* got None', 'a string', write('config.py', 'out_dir = None\n')),
    Case(T, CONFIG, r'config\.py:3: NameError', 'nowhere', write('config.py', '\n\nseed = nowhere\n')),
    Case(T, CONFIG, "can't be read", r'config\.py.*utf-8', write('config.py', b'out_dir = "\xe9"\n')),
    Case(T, CONFIG, "can't be read", 'directory', folder('config.py')),
    Case(S, CONFIG, r'config\.py:1: unknown key max_iters', '--help|did you mean'),
]  # fmt: skip

TRAIN_BIN, META_JSON = 'data/tiny/train.bin', 'data/tiny/meta.json'
DATA = [
    Case(T, '--dataset=tinny', r'no data set .*tinny \(there are rows, tiny, wide\)', PREPARE),
    Case(T, '--data_dir={place}/nowhere', 'no data set', PREPARE),
    Case(T, '--dataset=', r'no .*train\.bin', PREPARE),
    Case(T, '', r'no .*train\.bin', PREPARE, remove(TRAIN_BIN)),
    Case(T, '', r"val\.bin can't be read \(No such file", PREPARE, remove('data/tiny/val.bin')),
    Case(T, '', r"train\.bin can't be read|train\.bin has", PREPARE, folder(TRAIN_BIN)),
    Case(T, '', r'train\.bin is empty', PREPARE, write(TRAIN_BIN, b'')),
    Case(T, '', r'val\.bin is empty', PREPARE, write('data/tiny/val.bin', b'')),
    Case(T, '', r'train\.bin has 1,799 bytes, not a whole number of uint16', PREPARE, cut(TRAIN_BIN, -1)),
    Case(T, '', r'train\.bin has 450 uint16 tokens, and meta\.json says 900', PREPARE, cut(TRAIN_BIN, 0.5)),
    Case(T, '--block_size=200', r'val\.bin has 100 tokens', 'smaller --block_size'),
    Case(T, '--block_size=5000', r'train\.bin has 900 tokens', 'smaller --block_size'),
    Case(T, '', 'has the id 12, beyond the vocabulary of 12', PREPARE,
         write(TRAIN_BIN, 899 * b'\1\0' + b'\x0c\0')),
    Case(T, '', 'has the id 65535', PREPARE, write('data/tiny/val.bin', b'\xff\xff' + 99 * b'\1\0')),
    Case(T, '', '1,800 uint16 tokens', PREPARE, write(TRAIN_BIN, 900 * b'\1\0\0\0')),
    Case(T, '', '450 uint32 tokens', PREPARE, meta(dtype='uint32')),
    Case(T, '', "dtype 'float32'", 'must be uint16 or uint32.*' + PREPARE, meta(dtype='float32')),
    Case(T, '', 'has the id', PREPARE, meta(vocab_size=3, chars='abc')),
    Case(T, '', r"meta\.json can't be read", PREPARE, cut(META_JSON, 0.5)),
    Case(T, '', r"meta\.json can't be read", PREPARE, write(META_JSON, b'\xff\xfe\0')),
    Case(T, '', r"meta\.json can't be read", PREPARE, folder(META_JSON)),
    Case(T, '', 'is not a JSON object', PREPARE, write(META_JSON, '[1, 2]')),
    Case(T, '', 'format 99', 'reads 1', meta(format=99)),
    Case(T, '', 'vocab_size None', PREPARE, meta(vocab_size=None)),
    Case(T, '', "vocab_size '12'", PREPARE, meta(vocab_size='12')),
    Case(T, '', "unknown tokenizer 'words'", PREPARE, meta(tokenizer='words')),
    Case(T, '', '"chars" that are not 12', PREPARE, meta(chars='abc')),
    Case(T, '', '"chars" that are not 12', PREPARE, meta(chars=None)),
    Case(T, '', '"tokens" 5', PREPARE, meta(tokens=5)),
    Case(T, '', 'was being replaced', PREPARE, meta(replacing=True)),
    Case(T, '', 'no "source"', PREPARE, meta(source=None)),
    Case(T, '', r"meta\.pkl can't be read .*mkdir", PREPARE, nanogpt_meta({'vocab_size': 12, 'itos': Payload()})),
    Case(T, '', r"meta\.pkl can't be read", PREPARE, nanogpt_meta({'stoi': {}})),
    Case(T, '', r"meta\.pkl can't be read", PREPARE, nanogpt_meta([1, 2])),
    Case(T, '--dataset=rows', 'rows of 11 tokens', '--block_size=10'),
    Case(T, '--dataset=rows --block_size=10', r"train\.mask\.bin can't be read", PREPARE,
         remove('data/rows/train.mask.bin')),
    Case(T, '--dataset=rows --block_size=10', r'val\.mask\.bin has 50', PREPARE, cut('data/rows/val.mask.bin', 50)),
    Case(T, RESUME + ' --dataset=wide', 'wide is not the data set that the run .* began with', 'restore it'),
    Case(C, '', 'beyond the vocabulary', PREPARE, write(TRAIN_BIN, 900 * b'\x0c\0')),
    Case(Q, '', r'train\.bin is empty', PREPARE, write(TRAIN_BIN, b'')),
]  # fmt: skip

OTHER = 'older copy|only load checkpoints saved by'
CHECKPOINTS = [
    Case(T, '--init_from=resume', 'there is no checkpoint', 'start the run'),
    Case(S, '--out_dir={place}/nowhere', 'there is no checkpoint', 'train a model first'),
    Case('sample_mla.py', '', 'there is no checkpoint', 'train a model first', remove('mla')),
    Case(E, '--source={place}/nowhere', 'there is no checkpoint', 'train a model first'),
    Case(C, '', 'no checkpoint|truncated', '--source|older copy', write('mha/ckpt.pt', b'')),
    Case(T, RESUME, 'there is no checkpoint', 'train a model first', folder('mha/ckpt.pt')),
    Case(T, RESUME, 'truncated or not a checkpoint', 'older copy', write('mha/ckpt.pt', b'')),
    Case(T, RESUME, 'truncated or not a checkpoint', 'older copy', cut('mha/ckpt.pt', 0.5)),
    Case(T, RESUME, 'truncated or not a checkpoint', 'older copy', cut('mha/ckpt.pt', -1)),
    Case(T, RESUME, 'truncated or not a checkpoint', 'older copy', write('mha/ckpt.pt', 'these are no weights')),
    Case(T, '--init_from=auto --out_dir={place}/mha', 'truncated', 'older copy', cut('mha/ckpt.pt', 0.9)),
    Case(S, '', 'truncated or not a checkpoint', 'older copy', cut('mha/ckpt.pt', 0.9)),
    Case(S, '--out_dir={place}/data/tiny/train.bin', 'is not a checkpoint|could run code', OTHER),
    Case(T, RESUME, 'could run code', 'only load checkpoints saved by', ckpt(lambda c: c.update(config=Payload()))),
    Case(S, '', 'could run code', 'only load checkpoints saved by', ckpt(lambda c: c.update(model_args=Payload()))),
    Case(S, '', 'truncated|could run code', OTHER,
         lambda place: write('mha/ckpt.pt', pickle.dumps({'model': {}, 'model_args': Payload()}))(place)),
    Case(E, '', 'could run code', 'only load checkpoints saved by', ckpt(lambda c: torch.nn.Linear(2, 2))),
    Case(T, RESUME_MLA, 'the other attention', 'train_mla.py'),
    Case(TM, RESUME, 'the other attention', 'python train.py --resume=yes'),
    Case(T, RESUME, "lacks 'model' or 'model_args'", 'train.py wrote', ckpt(lambda c: {'weights': 1})),
    Case(T, RESUME, "lacks 'model' or 'model_args'", 'train.py wrote', ckpt(lambda c: torch.zeros(3))),
    Case(T, RESUME, "attention is 'gqa'", 'mha and mla', ckpt(lambda c: c.update(attention='gqa'))),
    Case(S, '', r'Missing key.*lm_head\.weight', OTHER, ckpt(lambda c: c['model'].__delitem__('lm_head.weight'))),
    Case(S, '', 'size mismatch', OTHER, ckpt(lambda c: c['model'].update({'lm_head.weight': torch.zeros(12, 9)}))),
    Case(S, '', 'Unexpected key', OTHER, ckpt(lambda c: c['model'].update(more=torch.zeros(2)))),
    Case(S, '', r'transformer\.h\.1|1 layers', OTHER, ckpt(lambda c: c['model_args'].update(n_layer=2))),
    Case(S, '', 'n_embd=9 must be a multiple', OTHER, ckpt(lambda c: c['model_args'].update(n_embd=9))),
    Case(S, '', 'n_experts', OTHER, ckpt(lambda c: c['model_args'].update(n_experts=2))),
    Case(S, '', 'model_args', OTHER, ckpt(lambda c: c['model_args'].update(n_layer='two'))),
    Case(S, '', 'model_args', OTHER, ckpt(lambda c: c.update(model_args=[1, 2]))),
    Case(S, '', "'model'", OTHER, ckpt(lambda c: c.update(model=[torch.zeros(2)]))),
    Case(S, '', "'model'", OTHER, ckpt(lambda c: c.update(model={1: torch.zeros(2)}))),
    Case(S, '', "'tokenizer'", OTHER, ckpt(lambda c: c.update(tokenizer='char'))),
    Case(S, '', "'config'", OTHER, ckpt(lambda c: c.update(config=3, tokenizer=None))),
    Case(S, '', 'vocabulary|chars|tokenizer', 'meta|char', ckpt(lambda c: c['tokenizer'].update(chars=''))),
    Case(S, '', "unknown tokenizer 'words'", 'char, byte, bpe or gpt2',
         ckpt(lambda c: c['tokenizer'].update(tokenizer='words'))),
    Case(S, '', 'model has 12 tokens, and the tokenizer .* 256', 'meta.json',
         ckpt(lambda c: c.update(tokenizer={'tokenizer': 'byte'}))),
    Case(T, RESUME, "'iter_num'", OTHER, ckpt(lambda c: c.update(iter_num='one'))),
    Case(T, RESUME, "'best_val_loss'", OTHER, ckpt(lambda c: c.update(best_val_loss='low'))),
    Case(T, RESUME, "'optimizer'", OTHER, ckpt(lambda c: c.update(optimizer={'state': {}}))),
    Case(T, RESUME, "'optimizer'", OTHER, ckpt(lambda c: c['optimizer']['param_groups'].__delitem__(1))),
    Case(T, RESUME, "'optimizer'", OTHER,
         ckpt(lambda c: c['optimizer']['state'][0].update(exp_avg=torch.zeros(3)))),
    Case(T, RESUME, "'optimizer'", OTHER, ckpt(lambda c: c['optimizer']['state'].__delitem__(1))),
    Case(T, RESUME + ' --block_size=32', 'block_size=32 cannot be applied', 'leave it out'),
    Case(T, RESUME + ' --block_size=8', 'block_size=8 cannot be applied', 'leave it out'),
    Case(T, RESUME, r'log\.csv', 'move it away', write('mha/log.csv', b'iter,loss\n\xff,2\n')),
    Case(T, RESUME, r'log\.csv', 'move it away', write('mha/log.csv', 'name,colour\na,b\n')),
    Case(T, RESUME, r'log\.csv', 'move it away', folder('mha/log.csv')),
    Case(E, '', "RoPE, which GPT-2 can't express", "pos='learned' or MLA",
         ckpt(lambda c: c['model'].__delitem__('transformer.wpe.weight') or c['model_args'].update(pos='rope'))),
]  # fmt: skip

PROMPTS = [
    Case(S, '--start=abz', "the character 'z' is not among the 12", "knows: 'abcdefghijkl'"),
    Case(S, '--start=', 'start is empty', 'newline'),
    Case(S, '--start=FILE:{place}/nowhere.txt', r'nowhere\.txt', 'UTF-8 text file'),
    Case(S, '--start=FILE:{place}', "can't be read", 'UTF-8 text file'),
    Case(S, '--start=FILE:{place}/prompt.txt', "can't be read .*utf-8", 'UTF-8 text file',
         write('prompt.txt', b'\xe9')),
    Case(S, '--start=FILE:{place}/prompt.txt', 'start is empty', 'newline', write('prompt.txt', '')),
    Case(S, '--start=FILE:{place}/prompt.txt', "the character '!'", "knows: 'abc", write('prompt.txt', 'a!')),
    Case(S, '--start=FILE:', "can't be read", 'UTF-8 text file'),
    Case(S, '--stop=ab', "stop must be one token, and 'ab' is 2", 'shorter'),
    Case(S, '--stop=!', "the character '!' is not among", "knows: 'abc"),
    Case(S, '', 'stand for no text', 'tokenizer: none', ckpt(lambda c: c['tokenizer'].update(tokenizer='none'))),
    Case(Q, '--start=!', "the character '!' is not among", "knows: 'abc"),
    Case(Q, '', r"the character '\\n' is not among", "knows: 'abc"),
    Case(Q, '--start=', 'start is empty', '--start|newline'),
]  # fmt: skip

TABLE = {'flags': FLAGS, 'config': CONFIGS, 'data': DATA, 'checkpoint': CHECKPOINTS, 'prompt': PROMPTS}


def command_line(case, place):
    """The arguments of a case: those with which the script would work, then the case's own."""
    usual = [f'--{key}={value}' for key, value in ARGUMENTS[case.script].items()]
    return [argument.replace('{place}', str(place)) for argument in [*usual, *case.arguments.split()]]


def check(case, place, code, errors):
    """What every wrong input ends in."""
    assert 'Traceback' not in errors, errors
    lines = errors.splitlines()
    assert code == 2, (code, errors)
    assert lines[-1].startswith('error: ') and sum(line.startswith('error: ') for line in lines) == 1, errors
    assert re.search(case.fault, lines[-1]), lines[-1]
    assert re.search(case.remedy, lines[-1]), lines[-1]
    assert len(lines[-1].replace(str(place), '')) < 400, lines[-1]


def cases():
    for name, group in TABLE.items():
        for number, case in enumerate(group):
            label = f'{name}-{number:03}-{Path(case.script).stem}-{case.arguments.replace("{place}", "")[:40]}'
            yield pytest.param(case, id=label.replace(' ', ''))


@pytest.mark.parametrize('case', list(cases()))
def test_bad_input_gets_one_line_and_changes_nothing(case, place):
    if case.damage:
        case.damage(place)
    before = snapshot(place)
    done = forking.run(case.script, command_line(case, place))
    check(case, place, done.returncode, done.stderr)
    assert snapshot(place) == before
    assert not PROOF.exists()


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_a_checkpoint_cut_at_fifty_places_is_refused(script, place):
    path = place / 'mha' / 'ckpt.pt'
    whole = path.read_bytes()
    case = Case(script, RESUME if script == 'train.py' else '', 'truncated or not a checkpoint', OTHER)
    for part in range(50):
        path.write_bytes(whole[: len(whole) * part // 50])
        done = forking.run(script, command_line(case, place))
        check(case, place, done.returncode, done.stderr)
    path.write_bytes(whole)
    assert forking.run(script, command_line(case, place)).returncode == 0  # it was the cut


@pytest.mark.parametrize('case', [FLAGS[0], CHECKPOINTS[7]], ids=['flag', 'checkpoint'])
def test_a_process_of_its_own_ends_the_same_way(case, place):
    """The table's runs are forks of one process; what they show holds for `python script` too."""
    if case.damage:
        case.damage(place)
    command = [sys.executable, case.script, *command_line(case, place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    check(case, place, done.returncode, done.stderr)
