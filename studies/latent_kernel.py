"""
Is one pass over the latents faster than two products? ops/latent_attention.py against ops/kernels.py, on a GPU.

$ python studies/latent_kernel.py                            # one layer's attention of a decode step, at four points
$ TRITON_INTERPRET=1 python studies/latent_kernel.py --device=cpu --batch_sizes=1 --contexts=64   # only that it runs

Both attend with the same queries over the same latents in bfloat16, and the kernel also over int8. Each is captured as
a CUDA graph, as in decoding, and timed in alternating rounds. The table has the error of each beside the formula in
float64, and which part of the peak bandwidth the latents, read once, make up.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import functools
import importlib.util
import itertools
import os

import torch

from analysis import report
from core.cli import machine
from core.cli.arguments import check_file, whole_numbers
from core.cli.errors import UserError
from core.cli.files import write_json
from core.speed import gpus, timing
from ops.kernels import attend_rows

# ----------------------------------------------------------------------------------------------------------------------
batch_sizes = '1,64'
contexts = '1024,16384'
n_latents = '192'
n_rope = 0
n_head = 12
rounds = 9  # timed rounds, after one round of warm-up
json = ''  # write all numbers to this file
device = 'auto'
seed = 1337
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

if not importlib.util.find_spec('triton'):
    raise UserError("Triton is not installed, which PyTorch's CUDA builds contain; on a CPU: pip install triton")
from ops.latent_attention import attend_latents

if json:
    check_file(json, 'json')
device = machine.pick_device(device)
if device == 'cpu' and os.environ.get('TRITON_INTERPRET') != '1':
    raise UserError('the kernel needs a GPU; set TRITON_INTERPRET=1 to see that it runs, at --contexts=64')
dtype = torch.bfloat16 if device.startswith('cuda') else torch.float32
SCALE = 0.125


def captured(function):
    """A function that replays `function` as a CUDA graph; itself on a CPU."""
    if device == 'cpu':
        return function
    for _ in range(3):  # compiles the kernel, and lets libraries initialize
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure(B, S, r):
    """One row per way of attending, at one batch size, context and rank."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = (B, n_head, r + n_rope), (B, 1, S, r + n_rope)
    q, latents = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
    length, seen = torch.tensor([S], device=device), torch.ones(1, S, dtype=torch.bool, device=device)
    factors = latents.float().abs().amax(-1) / 127
    low = (latents.float() / factors[..., None]).round().to(torch.int8)
    kernel = functools.partial(attend_latents, q, rank=r, scale=SCALE, length=length)
    ways = {
        'two products': lambda: attend_rows(q[:, None], latents, latents, SCALE, seen)[:, 0, :, :r],
        'one pass': functools.partial(kernel, latents=latents),
        'one pass, int8': functools.partial(kernel, latents=low, factors=factors),
    }
    first, few = q[0].double(), latents[0, 0].double()  # of one sequence: float64 takes memory
    exact = (first @ few.mT * SCALE).softmax(-1) @ few[:, :r]
    errors = {name: ((way()[0].double() - exact).norm() / exact.norm()).item() for name, way in ways.items()}
    replays = {name: captured(way) for name, way in ways.items()}
    seconds = timing.alternate(replays, rounds, device, turn=0.05 if device != 'cpu' else 0)
    rows = [
        dict(name=name, batch_size=B, context=S, n_latent=r, error=errors[name], **timing.spread(times))
        for name, times in seconds.items()
    ]
    for row in rows:
        read = low.nbytes + factors.nbytes if 'int8' in row['name'] else latents.nbytes
        row |= dict(bytes_per_s=1e3 * read / row['ms'], speed=rows[0]['ms'] / row['ms'])
    return rows


sizes = [whole_numbers(config[key], key) for key in ('batch_sizes', 'contexts', 'n_latents')]
with torch.no_grad():
    steps = [row for size in itertools.product(*sizes) for row in measure(*size)]
gpu = gpus.gpu_of(device)
columns = ('B', 'T', 'r', 'attention', 'ms', 'speed / two products', 'of bandwidth', 'relative error')
table = []
for row in steps:
    what = (row[key] for key in ('batch_size', 'context', 'n_latent', 'name'))
    part = f'{row["bytes_per_s"] / 1e9 / gpu.bandwidth:.0%}' if gpu else ''
    table.append((*what, f'{row["ms"]:.4f}', f'{row["speed"]:.2f}', part, f'{row["error"]:.1e}'))
print(report.markdown_table(columns, table, True))
if json:
    write_json(json, dict(machine=timing.describe_machine(device, str(dtype)), config=config, steps=steps))
