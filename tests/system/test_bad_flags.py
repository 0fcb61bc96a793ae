"""Flags, config files and prompts that a user can get wrong: see bad_input.py."""

import os
import shutil
import subprocess
import sys

import pytest
from support import forking
from support.bad_input import (
    BENCH,
    CHAR,
    CONTEST,
    GPT2,
    PREPARE,
    REPEATS,
    ROOT,
    SIZES,
    STUDY,
    STUDY_TEXT,
    TEXT,
    TM,
    WEB,
    C,
    Case,
    E,
    F,
    Q,
    S,
    T,
    assert_refused,
    cases,
    check,
    ckpt,
    command_line,
    folder,
    write,
)

from model import GPT, GPTConfig

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')]

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
    Case(T, '--pos=absolute', "pos is 'absolute'", 'learned, rope or none'),
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
    Case(C, '--dataset=wide', 'was trained on char tokens', 'same tokenizer'),
    Case(C, '--out_dir={place}/prompt.txt', r'prompt\.txt', '--out_dir'),
    Case(C, '--json={place}/nowhere/x.json', r'nowhere/x\.json', '--json'),
    Case(E, '--out_dir={place}/mla', 'is not empty', '--overwrite=True'),
    Case(E, '--out_dir={place}/prompt.txt', r'prompt\.txt', '--out_dir'),
    Case(F, '--models=', 'models', '--models'),
    Case(F, '--models={place}/nowhere', 'nowhere', 'train a model first|--models'),
    Case(F, '--models={place}/mha', 'initial values', 'train it first',
         ckpt(lambda c: c.update(model=GPT(GPTConfig(vocab_size=12, **SIZES)).state_dict()))),
    Case(F, '--sequences=0', 'sequences', 'at least'),
    Case(F, '--length=0', 'length', 'at least'),
    Case(F, '--out_dir={place}/prompt.txt', r'prompt\.txt', '--out_dir'),
    Case(Q, '--size=tpu', "size is 'tpu'", 'auto'),
    Case(Q, '--max_iters=-1', 'max_iters', 'negative|at least'),
    Case(Q, '--dataset=nowhere', 'no data set', PREPARE),
    Case(Q, '--size=cpu --start=a --out_dir={place}/both', 'another', '--out_dir.*--overwrite=True',
         lambda place: shutil.copytree(place / 'mha', place / 'both' / 'mha')),
    Case(STUDY, '--seeds=-1', 'seeds', 'negative|at least'),
    Case(CONTEST, '--rate=0', 'rate', 'above 0|greater'),
    Case(CONTEST, '--blocks=llama', "blocks is 'llama'", 'must be modern or gpt2'),
    Case(CONTEST, '--device=cuda:77', 'cuda:77', 'auto'),
    Case(CONTEST, '--tuning_seeds=-1', 'tuning_seeds', 'negative|at least'),
    Case(STUDY_TEXT, '--rates=4e-3,high', "rates is '4e-3,high'", 'such as'),
    Case(STUDY_TEXT, '--seeds=-1', 'seeds', 'negative|at least'),
    Case(CONTEST, '--reuse={place}/prompt.txt', "can't be read as a study", 'name the .json of another'),
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
    Case(WEB, '--input={place}/nowhere', 'no file or folder', '--input'),
    Case(REPEATS, '--min_period=1', 'min_period', '2 to half'),
    Case(REPEATS, '--vocab_size=-1', 'vocab_size', 'at least 0'),
]  # fmt: skip

LONG = 300 * 'a'
VALUES = [
    Case(T, f'--out_dir={{place}}/{LONG}', 'File name too long', 'another --out_dir'),
    Case(T, f'--dataset={LONG}', 'File name too long', 'check the path'),
    Case(T, f'--data_dir={{place}}/{"/".join([LONG[:99]] * 50)}', 'File name too long', 'check the path'),
    Case(S, f'--out_dir={LONG}', 'there is no checkpoint', 'train a model first'),
    Case(C, f'--json={LONG}', 'File name too long', 'another --json'),
    Case(TEXT, f'--input={LONG}', 'no file or folder', 'check --input'),
    Case(TEXT, f'--out_dir={LONG}', 'File name too long', 'another --out_dir'),
    Case(REPEATS, f'--folder={LONG}', 'File name too long', 'another --folder'),
    Case(T, ['--out_dir="{place}/a\\0b"'], r"out_dir is '.*/a\\x00b'", r'cannot contain the character .0'),
    Case(S, ['--start="FILE:a\\0b"'], "can't be read", 'text file'),
    Case(F, ['--models="a\\0b"'], 'models is', r'cannot contain the character .0'),
    Case(T, '--device=meta', "device 'meta' is not available", '--device=cpu'),
    Case(S, '--device=vulkan', "device 'vulkan' is not available", '--device=cpu'),
    Case(F, '--device=cpu:x', "device 'cpu:x' is not available", '--device=cpu'),
    Case(C, '--json={place}', 'it is a folder', 'another --json'),
    Case(BENCH, '--json={place}', 'it is a folder', 'another --json'),
    Case(BENCH, '--plot={place}/nowhere/x.png', 'nowhere does not exist', 'another --plot'),
    Case(CONTEST, '--figure={place}/nowhere/x.png', 'nowhere does not exist', 'another --figure'),
    Case(STUDY_TEXT, '--figure={place}/nowhere/x.png', 'nowhere does not exist', 'another --figure'),
    Case(STUDY, '--out_dir={place}/prompt.txt', 'not a writable folder', 'another --out_dir'),
    Case(T, '--n_layer=1e30', 'n_layer is 1000000000000000019', 'at most 1,000'),
    Case(T, '--max_iters=-1e30', 'max_iters', 'at least 0'),
    Case(T, '--lr_decay_iters=-1', 'lr_decay_iters is -1', 'at least 0'),
    Case(F, '--sequences=1e30', 'sequences', 'at most 100,000'),
    Case(F, '--controls=1e30', 'controls', 'at most 1,000'),
    Case(F, '--ablate_sequences=0', 'ablate_sequences is 0', 'at least 1'),
    Case(F, '--models=,', "models is ','", 'names nothing'),
    Case(F, '--sweep=,,', "sweep is ',,'", 'names nothing'),
    Case(BENCH, '--mode=sample --contexts=1e30', 'contexts', 'whole numbers'),
    Case(BENCH, f'--mode=sample --contexts=1{LONG.replace("a", "0")}', 'contexts', 'at most'),
    Case(S, '--temperature=inf', 'temperature is inf', 'at most 100'),
    Case(S, f'--top_k=1{LONG.replace("a", "0")}', 'top_k', 'at most'),
    Case(S, '--start=FILE:/dev/zero', r'/dev/zero can.t be read .*bytes', 'text file'),
    Case(C, '--eval_tokens=16', 'two windows of 16 tokens', 'raise --eval_tokens=16'),
    Case(C, '--eval_tokens=1', 'eval_tokens is 1', 'at least 2'),
    Case(T, ['--dataset=\x1b]0;title\x07'], r'no data set .*\\x1b\]0;title\\x07', 'prepare.py'),
    Case(S, ['--out_dir={place}/\x1b[31m'], r'no checkpoint .*\\x1b\[31m', 'train a model'),
    Case(T, ['\x1b[31m.py'], r"'\\x1b\[31m\.py' does not exist", 'config'),
]  # fmt: skip

CONFIG = '{place}/config.py'
CONFIGS = [
    Case(T, '{place}/nowhere.py', r"nowhere\.py' does not exist", 'config/'),
    Case(T, 'config/train_shakespear_char.py', 'does not exist', r'did you mean config/train_shakespeare_char\.py\?'),
    Case(T, 'config/train_gpt2', "unexpected argument 'config/train_gpt2'", r'did you mean config/train_gpt2\.py\?'),
    Case(T, CONFIG, r'config\.py:2: SyntaxError', r'config\.py:2', write('config.py', 'max_iters = 1\nseed = = 3\n')),
    Case(T, f'{CONFIG} --max_iter=1', 'unknown key --max_iter:', r'did you mean --max_iters\?',
         write('config.py', 'max_iter = 1\n')),
    Case(T, CONFIG, r"config\.py:1: max_iters .* got 'ten'", 'whole number', write('config.py', 'max_iters = "ten"\n')),
    Case(T, CONFIG, r'config\.py:1: compile .* got 1', 'True or False', write('config.py', 'compile = 1\n')),
    Case(T, CONFIG, r'config\.py:1: out_dir .* got None', 'a string', write('config.py', 'out_dir = None\n')),
    Case(T, CONFIG, r'config\.py:3: NameError', 'nowhere', write('config.py', '\n\nseed = nowhere\n')),
    Case(T, CONFIG, "can't be read", r'config\.py.*utf-8', write('config.py', b'out_dir = "\xe9"\n')),
    Case(T, CONFIG, "can't be read", 'directory', folder('config.py')),
]  # fmt: skip

PROMPTS = [
    Case(S, '--start=abz', "the character 'z' is not among the 12", "knows: 'abcdefghijkl'"),
    Case(S, ['--start=a\\n'], r"the character '\\\\' is not among", "knows: 'abc"),
    Case(S, '--start=', 'start is empty', 'newline'),
    Case(S, '--start=FILE:{place}/nowhere.txt', r'nowhere\.txt', 'text file'),
    Case(S, '--start=FILE:{place}', "can't be read", 'text file'),
    Case(S, '--start=FILE:{place}/prompt.txt', 'not UTF-8 text', 'save it as UTF-8',
         write('prompt.txt', b'\xe9')),
    Case(S, '--start=FILE:{place}/prompt.txt', 'start is empty', 'newline', write('prompt.txt', '')),
    Case(S, '--start=FILE:{place}/prompt.txt', "the character '!'", "knows: 'abc", write('prompt.txt', 'a!')),
    Case(S, '--start=FILE:', "can't be read", 'text file'),
    Case(S, '--stop=ab', "stop must be one token, and 'ab' is 2", 'shorter'),
    Case(S, '--stop=!', "the character '!' is not among", "knows: 'abc"),
    Case(S, '', "'a' is no id", 'numbers from 0 to', ckpt(lambda c: c['tokenizer'].update(tokenizer='none'))),
    Case(Q, '--start=!', "the character '!' is not among", "knows: 'abc"),
    Case(Q, '', r"a newline unless --start gives another, and the character '\\n'", "knows: 'abc"),
    Case(Q, '--start=', 'start is empty', '--start|newline'),
]  # fmt: skip


@pytest.mark.parametrize('case', cases(flags=FLAGS, value=VALUES, config=CONFIGS, prompt=PROMPTS))
def test_bad_flags_get_one_line_and_change_nothing(case, place):
    assert_refused(case, place)


@pytest.mark.parametrize('case', [FLAGS[0]])
def test_a_process_of_its_own_ends_the_same_way(case, place):
    """The tables' runs are forks of one process; what they show holds for `python script` too."""
    if case.damage:
        case.damage(place)
    command = [sys.executable, case.script, *command_line(case, place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    check(case, place, done.returncode, done.stderr)


@pytest.mark.parametrize('script', [T, TM, S, C, E, F, Q, BENCH, 'sizing.py', STUDY, CONTEST, STUDY_TEXT])
def test_scripts_say_where_they_must_be_run(script, tmp_path):
    """Started elsewhere, where their relative paths lead nowhere."""
    done = forking.run(ROOT / script, ['--help'], cwd=tmp_path)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr == f"error: run it from the repository's folder, where its data and configs are: cd {ROOT}\n"
