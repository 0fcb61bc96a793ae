"""Checkpoints that are missing, damaged, or could run code: see bad_input.py."""

import os
import pickle

import pytest
import torch
from support import forking
from support.bad_input import (
    OTHER,
    RESUME,
    RESUME_MLA,
    TM,
    C,
    Case,
    E,
    Payload,
    S,
    T,
    assert_refused,
    cases,
    check,
    ckpt,
    command_line,
    cut,
    folder,
    remove,
    write,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')]

CHECKPOINTS = [
    Case(T, '--init_from=resume', 'there is no checkpoint', 'start the run'),
    Case(S, '--out_dir={place}/nowhere', 'there is no checkpoint', 'train a model first'),
    Case('sample_mla.py', '', 'there is no checkpoint', 'train a model first', remove('mla')),
    Case(E, '--source={place}/nowhere', 'is no checkpoint, no GGUF file, no folder', 'name one of them'),
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
    Case(S, '', r'Missing key.*ln_f\.weight', OTHER, ckpt(lambda c: c['model'].__delitem__('transformer.ln_f.weight'))),
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
    Case(T, RESUME, "'optimizer'", 'init_from', ckpt(lambda c: c.update(optimizer={'state': {}}))),
    Case(T, RESUME, "'optimizer'", 'init_from', ckpt(lambda c: c['optimizer']['param_groups'].__delitem__(1))),
    Case(T, RESUME, "'optimizer'", 'init_from',
         ckpt(lambda c: c['optimizer']['state'][0].update(exp_avg=torch.zeros(3)))),
    Case(T, RESUME, "'optimizer'", 'init_from', ckpt(lambda c: c['optimizer']['state'].__delitem__(1))),
    Case(T, RESUME + ' --block_size=32', 'block_size=32 cannot be applied', 'leave out what sets it'),
    Case(T, RESUME + ' --block_size=8', 'block_size=8 cannot be applied', 'leave out what sets it'),
    Case(T, RESUME, r'log\.csv', 'move it away', write('mha/log.csv', b'iter,loss\n\xff,2\n')),
    Case(T, RESUME, r'log\.csv', 'move it away', write('mha/log.csv', 'name,colour\na,b\n')),
    Case(T, RESUME, r'log\.csv', 'move it away', folder('mha/log.csv')),
    Case(E, '', 'no class has such a model: .* GPT2LMHeadModel no pos=rope', 'sample.py reads it',
         ckpt(lambda c: c['model'].__delitem__('transformer.wpe.weight') or c['model_args'].update(pos='rope'))),
]  # fmt: skip


@pytest.mark.parametrize('case', cases(checkpoint=CHECKPOINTS))
def test_bad_checkpoints_get_one_line_and_change_nothing(case, place):
    assert_refused(case, place)


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_a_checkpoint_cut_anywhere_is_refused(script, place):
    path = place / 'mha' / 'ckpt.pt'
    whole = path.read_bytes()
    case = Case(script, RESUME if script == 'train.py' else '', 'truncated or not a checkpoint', OTHER)
    for part in range(10):
        path.write_bytes(whole[: len(whole) * part // 10])
        done = forking.run(script, command_line(case, place))
        check(case, place, done.returncode, done.stderr)
    path.write_bytes(whole)
    assert forking.run(script, command_line(case, place)).returncode == 0  # it was the cut
