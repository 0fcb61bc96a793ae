"""
Compare runs of train.py and train_mla.py, finished or still training: a table, a picture, and samples side by side.

$ python compare.py --runs=out-shakespeare-cpu,out-shakespeare-cpu-mla
$ python compare.py --runs=out-a,out-b --follow=30       # every 30 seconds, until all of them are finished

Losses are measured on the same windows of the validation split, so the difference to the first run is taken window by
window; its 95 % interval says how sure the difference between these two models is. It doesn't say what another seed
would give: train several, or see studies/contest.py.

Writes comparison.png, comparison.md and comparison.json (all numbers, and the samples) into out_dir.
"""

from core.cli.keys import begin

begin(__file__)  # before the slow imports

import os
import shutil
import time

import numpy as np
import torch

from analysis import comparison, report
from core.cli import arguments, errors, machine
from core.cli.errors import UserError
from core.runs import evaluation, models
from core.speed import timing
from core.text.dataset import TokenData
from core.text.prompt import prompt_ids
from core.text.tokenizer import load_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
runs = 'out,out-mla'  # folders of runs, separated by commas; differences are to the first
out_dir = 'out-comparison'
follow = 0  # seconds between two looks at runs that are still training; 0: look once
windows = 320  # validation windows to measure the losses on
batch_size = 32  # windows at a time
start = '\n'  # the prompt of the samples
sample_tokens = 300  # 0: no samples
data_dir = ''  # where the data sets are; '': where the runs found them
device = 'auto'
dtype = 'auto'
threads = 0
seed = 1337  # of the samples
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# ----------------------------------------------------------------------------------------------------------------------

folders = arguments.names(runs, 'runs')
if not folders:
    raise UserError('runs is empty; name the folders of trainings, such as --runs=out,out-mla')
arguments.check_folder(out_dir)
device = machine.pick_device(device)
machine.set_threads(threads)


def measure(run, tokens):
    """Fill in a saved run's numbers, losses and, of so many tokens, a sample. UserError without its data set."""
    keys = run.saved['config']
    if not keys.get('dataset'):
        raise UserError(f'{run.folder} does not say which data set it was trained on; leave it out of --runs')
    model = models.build_model(run.saved).to(device).eval()
    data = TokenData(os.path.join(data_dir or keys.get('data_dir', 'data'), keys['dataset']), model.config.block_size)
    chosen = machine.pick_dtype(dtype, device, model.config.n_embd)
    autocast = machine.autocast(device, chosen)
    run.losses = evaluation.window_losses(model, data, 'val', windows, batch_size, autocast)
    run.windows = (str(data.meta.get('sha256')), data.tokens['val'], data.block_size, len(run.losses))
    speeds = comparison.logged(run, 'tokens_per_s')[1]  # the first holds the warm-up
    loss, error = evaluation.mean_and_stderr(run.losses)
    speed = float(np.median(speeds[1:] if len(speeds) > 1 else speeds)) if len(speeds) else None
    run.numbers = dict(folder=run.folder, corpus=data.corpus, iterations=run.iterations)
    run.numbers |= comparison.sizes(model, chosen)
    run.numbers |= dict(dtype=chosen, tokens_per_s=speed, val_loss=loss, val_stderr=error)
    if tokens:
        tokenizer = load_tokenizer(data.meta)
        prompt = torch.tensor([prompt_ids(tokenizer, start, is_default=start == '\n')], device=device)
        torch.manual_seed(seed)
        with autocast:
            sample = model.generate(prompt, tokens, temperature=0.8, top_k=200, valid_ids=tokenizer.n_vocab)[0]
        run.numbers['sample'] = tokenizer.decode(sample.tolist())


def look():
    """Read, measure, draw and print all runs as they are now; returns True if all of them are finished."""
    found = [comparison.read(folder) for folder in folders]
    comparison.label(found)
    finished = all(run.done for run in found)
    tokens = sample_tokens if finished or not follow else 0  # samples when the runs that are followed have ended
    for run in found:
        if run.saved:
            measure(run, tokens)
    heading, rows = comparison.table(found)
    errors.output(report.markdown_table(heading, rows, padded=True))
    if any(run.windows for run in found):
        print('val loss: mean ± standard error over windows; differences: by window, ± half of the 95 % interval')
    if len({run.iterations for run in found}) > 1:
        print('note: the runs have different numbers of iterations, so the differences are not of the models alone')
    if tokens:
        print()
        errors.output(comparison.side_by_side(found, max(60, shutil.get_terminal_size((120, 0)).columns)))
    os.makedirs(out_dir, exist_ok=True)
    report.save_figure(os.path.join(out_dir, 'comparison.png'), comparison.curves(found), dpi=130)
    report.save_text(os.path.join(out_dir, 'comparison.md'), report.markdown_table(heading, rows))
    results = {run.label: dict(run.numbers, minus_first=comparison.difference(run, found[0])) for run in found}
    about = dict(device=device, torch=torch.__version__, machine=timing.describe_machine(device, dtype))
    report.save_json(os.path.join(out_dir, 'comparison.json'), dict(about, results=results))
    return finished


while not look() and follow:
    time.sleep(follow)
