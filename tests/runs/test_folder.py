"""core/runs/folder.py: what belongs to a run, who owns its folder, and which checkpoint is resumed."""

import errno
import multiprocessing
import os
import signal
import subprocess
import time

import pytest
import torch
from support import ROOT, forking

from core.cli import locks
from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import models
from core.runs.folder import RunFolder
from model import GPT, GPTConfig

HOLDER = """
import os, sys, time
from core.runs.folder import RunFolder
RunFolder(sys.argv[1]).acquire()
print(os.getpid(), flush=True)
time.sleep(60)
"""


def write(path, iteration):
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    checkpoints.save(str(path), models.contents(model, {}, iter_num=iteration))


def damage(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for place in range(middle, middle + 128):  # more than the padding between two parts of the file, which has no sum
        content[place] ^= 4
    path.write_bytes(content)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    command = [forking.interpreter(), '-c', HOLDER, tmp_path]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process.number = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()


def test_a_second_owner_is_refused_and_told_who_the_first_is(holder, tmp_path):
    with pytest.raises(UserError, match=f'in use by process {holder.number} on .* since 20'):
        RunFolder(str(tmp_path)).acquire()


def test_a_dead_owner_does_not_block(holder, tmp_path):
    os.kill(holder.number, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / '.lock').exists()  # it had no time to remove it
    folder = RunFolder(str(tmp_path))
    folder.acquire()
    assert f'process {os.getpid()} on ' in (tmp_path / '.lock').read_text()
    folder.lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_of_many_that_start_at_once_one_wins_again_and_again(tmp_path):
    def contend(queue):
        folder, end, wins = RunFolder(str(tmp_path)), time.monotonic() + 1, 0
        while time.monotonic() < end:
            try:
                folder.acquire()
            except UserError:
                continue
            inside = tmp_path / 'inside'
            with open(inside, 'x'):  # fails if another is in
                pass
            inside.unlink()
            folder.lock.release()
            wins += 1
        queue.put(wins)

    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    processes = [context.Process(target=contend, args=(queue,)) for _ in range(3)]
    for process in processes:
        process.start()
    wins = [queue.get(timeout=60) for _ in processes]
    assert sum(wins) > 3 and [process.join() or process.exitcode for process in processes] == [0, 0, 0]


def test_a_file_system_without_locks_is_said_and_no_obstacle(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(locks.fcntl, 'lockf', refuse)
    RunFolder(str(tmp_path)).acquire()
    assert 'file system without locks' in capsys.readouterr().err


def test_a_system_without_locks_makes_the_folder_too(tmp_path, monkeypatch):
    """As Windows does, which has no fcntl."""
    monkeypatch.setattr(locks, 'fcntl', None)
    RunFolder(str(tmp_path / 'new')).acquire()
    assert (tmp_path / 'new').is_dir()


def test_any_file_of_a_run_makes_the_folder_taken_and_others_do_not(tmp_path):
    folder = RunFolder(str(tmp_path))
    assert RunFolder(str(tmp_path / 'nowhere')).files() == []
    for name in ('notes.txt', 'ckpt.pth', 'my_ckpt.pt', 'ckpt_final.pt', 'log.csv.bak', 'induction.json'):
        (tmp_path / name).touch()
    assert folder.files() == []
    run = ['ckpt.pt', 'ckpt.pt.writing', 'ckpt_000500.pt', 'ckpt_1234567.pt', 'ckpt_best.pt', 'log.1.csv', 'log.csv']
    for name in run:
        (tmp_path / name).touch()
    assert [os.path.basename(path) for path in folder.files()] == run
    folder.begin(resumes=False, overwrite=True)
    folder.lock.release()
    assert folder.files() == [] and len(os.listdir(tmp_path)) == 6


def test_the_newest_whole_checkpoint_is_found(tmp_path, capsys):
    folder = RunFolder(str(tmp_path))
    assert folder.newest() == (None, None)
    write(tmp_path / 'ckpt_best.pt', 20)
    write(tmp_path / 'ckpt_000030.pt', 30)
    path, loaded = folder.newest()
    assert path.endswith('ckpt_000030.pt') and loaded['iter_num'] == 30
    write(tmp_path / 'ckpt.pt', 40)
    assert folder.newest()[1]['iter_num'] == 40 and capsys.readouterr().err == ''
    damage(tmp_path / 'ckpt.pt')
    path, loaded = folder.newest()
    assert path.endswith('ckpt_000030.pt') and loaded['iter_num'] == 30
    said = capsys.readouterr().err
    assert 'ckpt.pt is damaged' in said and 'resuming from' in said and 'ckpt_000030.pt' in said
    for name in ('ckpt_best.pt', 'ckpt_000030.pt'):
        damage(tmp_path / name)
    with pytest.raises(UserError, match='damaged'):
        folder.newest()


def test_a_log_without_a_checkpoint_is_kept(tmp_path):
    folder = RunFolder(str(tmp_path))
    for text in ('first', 'second'):
        (tmp_path / 'log.csv').write_text(text)
        folder.begin(resumes=False, overwrite=False)
    folder.lock.release()
    assert (tmp_path / 'log.1.csv').read_text() == 'first' and (tmp_path / 'log.2.csv').read_text() == 'second'


def test_every_flipped_bit_of_the_weights_is_found(tmp_path):
    path = tmp_path / 'ckpt.pt'
    write(path, 3)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    loads = 0
    for place in torch.randint(len(whole), (80,), generator=generator).tolist():
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            loaded = checkpoints.load(str(path))
        except UserError as error:
            assert 'damaged' in str(error) or 'truncated' in str(error)
            continue
        loads += 1  # a bit of padding, or of a header that nothing depends on
        path.write_bytes(whole)
        expected = checkpoints.load(str(path))
        assert all(torch.equal(loaded['model'][name], expected['model'][name]) for name in expected['model'])
    assert loads < 40


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='Linux tells where an open folder is')
def test_a_run_goes_on_where_its_folder_was_moved_to(tmp_path, capsys):
    folder = RunFolder(str(tmp_path / 'old'))
    folder.acquire()
    folder.follow()
    assert folder.ckpt == str(tmp_path / 'old' / 'ckpt.pt')
    (tmp_path / 'old').rename(tmp_path / 'new')
    folder.follow()
    assert folder.ckpt == str(tmp_path / 'new' / 'ckpt.pt')
    assert capsys.readouterr().err == f'{tmp_path / "old"} was renamed; the run goes on in {tmp_path / "new"}\n'
    folder.lock.release()
    assert not (tmp_path / 'new' / '.lock').exists()


def test_a_folder_that_is_gone_is_said_to_be(tmp_path):
    with pytest.raises(UserError, match='was moved or removed during the run'):
        checkpoints.save(str(tmp_path / 'gone' / 'ckpt.pt'), {'model': {}})


def test_a_run_that_began_meanwhile_is_not_overwritten(tmp_path):
    """A new run looks at the folder before its model is ready, and may not have the folder, which isn't there yet."""
    late = RunFolder(str(tmp_path / 'out'))
    assert late.files() == []
    other = RunFolder(late.path)
    other.begin(resumes=False, overwrite=False)
    (tmp_path / 'out' / 'log.csv').write_text('its log')
    write(tmp_path / 'out' / 'ckpt.pt', 3)
    other.lock.release()
    with pytest.raises(UserError, match='holds another run; resume it'):
        late.begin(resumes=False, overwrite=False)
    late.lock.release()
    assert sorted(os.listdir(late.path)) == ['ckpt.pt', 'log.csv']


def test_the_lock_of_a_folder_that_took_the_name_stays(tmp_path):
    """A trains in out, which is renamed; B starts in a new out; A ends without a save in between."""
    a = RunFolder(str(tmp_path / 'out'))
    a.acquire()
    (tmp_path / 'out').rename(tmp_path / 'old')
    process = subprocess.Popen(
        [forking.interpreter(), '-c', HOLDER, tmp_path / 'out'], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        number = int(process.stdout.readline())
        a.lock.release()
        assert f'process {number} on' in (tmp_path / 'out' / '.lock').read_text()
        with pytest.raises(UserError, match=f'in use by process {number} '):
            RunFolder(str(tmp_path / 'out')).acquire()
    finally:
        process.kill()
        process.wait()
