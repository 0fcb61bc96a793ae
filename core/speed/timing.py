"""
Measure time and memory: alternating rounds, medians and quartiles, peak memory, profiles, the machine's peak rate.

`device` is 'cpu' or a CUDA device. Nothing here knows a model.
"""

import contextlib
import gc
import json
import math
import os
import platform
import re
import statistics
import time
from collections import Counter

import torch

from core.cli import machine
from core.cli.errors import UserError
from core.speed import gpus

# ---- time ------------------------------------------------------------------------------------------------------------


def synchronize(device):
    """Wait until all kernels that were launched on `device` have finished."""
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)


def timed(function, times=1, device='cpu'):
    """Seconds per call, over `times` calls. A function that returns a number counts as that many calls."""
    synchronize(device)
    began = time.perf_counter()
    calls = sum(function() or 1 for _ in range(times))
    synchronize(device)
    return (time.perf_counter() - began) / calls


def alternate(contenders, rounds, device='cpu', turn=0.0):
    """
    Time functions {name: function} in alternating rounds, so that a disturbance of the machine affects all of them.

    turn: seconds for which each function is called per round; 0: one call. Where a turn has several calls, one more
    precedes them untimed: it finds the caches full of the previous function's data and that one's threads still
    spinning. Every second round runs in reverse order, because each run inherits the previous run's cache state.

    Returns {name: [seconds per call in each round]}. One round of warm-up comes first and is not part of it.
    """
    seconds, times = {name: [] for name in contenders}, {}
    for n in range(rounds + 1):
        for name in list(contenders)[:: 1 if n % 2 else -1]:
            function = contenders[name]
            if n == 0:  # warm-up
                function()
                times[name] = math.ceil(turn / timed(function, device=device)) if turn else 1
            else:
                if times[name] > 1:
                    function()
                seconds[name].append(timed(function, times[name], device))
    return seconds


def spread(values):
    """Median and quartiles of a list of seconds, in milliseconds: {'ms': float, 'ms_quartiles': [low, high]}."""
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3
    return {'ms': 1e3 * middle, 'ms_quartiles': [1e3 * low, 1e3 * high]}


def profile(function, path, device='cpu'):
    """Write a trace of one call to `path`, for chrome://tracing. Returns [(operation, its share)], longest first."""
    quiet_profiler()
    with torch.profiler.profile(acc_events=True) as trace:  # of the CPU and the GPU; it warns without acc_events
        function()
        synchronize(device)
    trace.export_chrome_trace(path)
    events = trace.key_averages()
    if device.startswith('cuda'):  # an operator's row repeats the time of its kernels, which have rows of their own
        kernels = torch.autograd.DeviceType.CUDA
        events = [e for e in events if e.device_type == kernels and not getattr(e, 'is_user_annotation', False)]
        times = Counter()  # kernels of one short name are counted together
        for event in events:
            times[kernel_name(event.key)] += event.self_device_time_total
    else:
        times = {event.key.removeprefix('aten::'): event.self_cpu_time_total for event in events}
    total = sum(times.values()) or 1  # without the driver's profiling there are no kernels
    return [(name, time / total) for name, time in sorted(times.items(), key=lambda item: -item[1])]


def kernel_name(signature, longest=60):
    """The name of a CUDA kernel without namespaces, parameters and template arguments, but for what it computes."""
    whole = signature.removeprefix('void ').replace('(anonymous namespace)::', '')
    name = re.split('[<(]', whole, maxsplit=1)[0].split('::')[-1].strip()
    what = re.search(r'\w*(Functor|_kernel_cuda|cutlass_\d|flash_\w)\w*', whole[len(name) :])
    name = f'{name} ({what[0]})' if what and what[0] not in name else name
    return name if len(name) <= longest else name[: longest - 1] + '…'


def quiet_profiler():
    """Turn off the log messages of PyTorch's profiler."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(function, device='cpu'):
    """Peak memory of one call, in bytes, above what is allocated before it (weights, for instance)."""
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    quiet_profiler()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    allocated = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == '[memory]':
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def most_memory(process):
    """
    Wait for a subprocess.Popen. Returns the peak memory of it and its children together, in bytes, read every 50 ms.

    Shared pages count once (PSS). Returns None where the system has no /proc/PID/smaps_rollup: anywhere but on Linux.
    """
    most = None
    while process.poll() is None:
        total, waiting = 0, [process.pid]
        while waiting:
            pid = waiting.pop()
            with contextlib.suppress(OSError, ValueError):
                with open(f'/proc/{pid}/smaps_rollup', encoding='ascii') as file:
                    total += next(int(line.split()[1]) << 10 for line in file if line.startswith('Pss:'))
                with open(f'/proc/{pid}/task/{pid}/children', encoding='ascii') as file:
                    waiting += file.read().split()
        most = max(most or 0, total) or None
        time.sleep(0.05)
    return most


def largest(peak, most):
    """
    The largest size from 1 to `most` for which peak(size) isn't None, and that value; (0, None) where there is none.

    Sizes are doubled, then bisected: what doesn't fit is tried log2(most) times at most.
    """
    fits, found, fails, size = 0, None, most + 1, 1
    while fits + 1 < fails:
        measured = peak(size)
        if measured is None:
            fails = size
        else:
            fits, found = size, measured
        size = min(2 * fits, most) if fails > most else (fits + fails) // 2
    return fits, found


# ---- the machine -----------------------------------------------------------------------------------------------------


def describe_machine(device, dtype):
    """The hardware and software that the numbers belong to: a dict."""
    name = torch.cuda.get_device_name(device) if device.startswith('cuda') else cpu_name()
    return {'device': name, 'threads': torch.get_num_threads(), 'dtype': dtype, 'torch': torch.__version__}


def cpu_name():
    """The CPU's model name, or its architecture where the system doesn't give a name."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return next(line.split(':')[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_flops(device, dtype):
    """
    Peak FLOP/s of matrix multiplications in `dtype`.

    On a CPU the fastest of eight, 2048 x 2048; on a GPU its data sheet's, or None where core/speed/gpus.py has none.
    """
    if device != 'cpu':
        return gpus.peak_flops(device, dtype)
    a, b = (torch.ones(2048, 2048, dtype=machine.DTYPES[dtype]) for _ in range(2))

    def multiply():
        torch.mm(a, b)

    return 2 * 2048**3 / min(timed(multiply) for _ in range(8))


def read_bandwidth():
    """GB/s at which the CPU reads memory, measured: the best sum of 256 MiB of float32 by all threads."""
    numbers = torch.ones(2**26)
    return numbers.nbytes / 1e9 / min(timed(lambda: numbers.sum() is None) for _ in range(9))


# ---- tables ----------------------------------------------------------------------------------------------------------


def print_table(rows, columns):
    """Print dicts as a Markdown table on stdout. columns: {heading: function of a row that returns a str}."""
    print('| ' + ' | '.join(columns) + ' |\n|' + '---|' * len(columns))
    for row in rows:
        print('| ' + ' | '.join(column(row) for column in columns.values()) + ' |', flush=True)
    print()


def read_times(path):
    """{name of a timed row: milliseconds} of a file written by bench.py --json. UserError where it can't be read."""
    try:
        with open(path, encoding='utf-8') as file:
            found = json.load(file)
        rows = [row for part in found.values() if isinstance(part, list) for row in part]
        return {' '.join(str(row[k]) for k in ('name', 'batch_size', 'context') if k in row): row['ms'] for row in rows
                if 'out_of_memory' not in row}  # fmt: skip
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read as a measurement ({error}); name a file written by --json") from error


def ms_text(row):
    """A row's median and quartiles (see `spread`) as text: '12.3 (12.1 to 12.9)'."""
    low, high = row['ms_quartiles']
    return f'{row["ms"]:.1f} ({low:.1f} to {high:.1f})'


def shown(row, key, form, factor=1):
    """row[key] * factor as text; '' where there is none."""
    return f'{row[key] * factor:{form}}' if row and key in row else ''
