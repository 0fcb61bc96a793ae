"""
Measure time and memory: alternating rounds, medians and quartiles, peak memory, profiles, the machine's peak rate.

`device` is 'cpu' or a CUDA device. Nothing here knows a model.
"""

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from core.cli import machine

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # no log messages of PyTorch's profiler

# ---- time ------------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    """Wait until all kernels that were launched on `device` have finished."""
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], calls: int = 1, device: str = 'cpu') -> float:
    """Seconds per call."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def alternate(
    contenders: dict[str, Callable[[], Any]], rounds: int, device: str = 'cpu', turn: float = 0.0
) -> dict[str, list[float]]:
    """
    Time functions {name: function} in alternating rounds, so that a disturbance of the machine affects all of them.

    turn: seconds for which each function is called per round; 0: one call. Where a turn has several calls, one more
    precedes them untimed: it finds the caches full of the previous function's data and that one's threads still
    spinning. Every second round runs in reverse order, because each run inherits the previous run's cache state.

    Returns {name: [seconds per call in each round]}. One round of warm-up comes first and is not part of it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    calls = {}
    for n in range(rounds + 1):
        for name in list(contenders)[:: 1 if n % 2 else -1]:
            function = contenders[name]
            if n == 0:  # warm-up
                function()
                calls[name] = math.ceil(turn / timed(function, device=device)) if turn else 1
            else:
                if calls[name] > 1:
                    function()
                seconds[name].append(timed(function, calls[name], device))
    return seconds


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles of seconds, in milliseconds: {'ms': float, 'ms_quartiles': [low, high]}."""
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3
    return {'ms': 1e3 * middle, 'ms_quartiles': [1e3 * low, 1e3 * high]}


def ms_text(row: dict[str, Any]) -> str:
    """A row's median and quartiles (see `spread`) as text: '12.3 (12.1 to 12.9)'."""
    low, high = row['ms_quartiles']
    return f'{row["ms"]:.1f} ({low:.1f} to {high:.1f})'


def profile(function: Callable[[], Any], path: str, device: str = 'cpu') -> list[tuple[str, float]]:
    """Write a trace of one call to `path`, for chrome://tracing. Returns [(operation, its part)], longest first."""
    with torch.profiler.profile(acc_events=True) as trace:  # of the CPU and the GPU; it warns without acc_events
        function()
        synchronize(device)
    trace.export_chrome_trace(path)
    events = trace.key_averages()
    if device.startswith('cuda'):  # an operator's row repeats the time of its kernels, which have rows of their own
        kernels = torch.autograd.DeviceType.CUDA
        events = [e for e in events if e.device_type == kernels and not getattr(e, 'is_user_annotation', False)]
        times = {event.key: event.self_device_time_total for event in events}
    else:
        times = {event.key.removeprefix('aten::'): event.self_cpu_time_total for event in events}
    total = sum(times.values()) or 1  # without the driver's profiling there are no kernels
    return [(name, time / total) for name, time in sorted(times.items(), key=lambda item: -item[1])]


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(function: Callable[[], Any], device: str = 'cpu') -> int:
    """Peak memory of one call, in bytes, above what is allocated before it (weights, for instance)."""
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    allocated = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == '[memory]':
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def largest(peak: Callable[[int], Any], most: int) -> tuple[int, Any]:
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


def describe_machine(device: str, dtype: str) -> dict[str, Any]:
    """The hardware and software that the numbers belong to."""
    name = torch.cuda.get_device_name(device) if device.startswith('cuda') else cpu_name()
    return {'device': name, 'threads': torch.get_num_threads(), 'dtype': dtype, 'torch': torch.__version__}


def cpu_name() -> str:
    """The CPU's model name, or its architecture where the system doesn't give a name."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return next(line.split(':')[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cpu_flops(dtype: str) -> float:
    """FLOP/s of matrix multiplications on the CPU, measured: the fastest of four, 2048 x 2048."""
    a, b = (torch.ones(2048, 2048, dtype=machine.DTYPES[dtype]) for _ in range(2))
    return 2 * 2048**3 / min(timed(lambda: torch.mm(a, b)) for _ in range(4))


def cpu_bandwidth() -> float:
    """GB/s at which the CPU reads memory, measured: the best sum of 256 MiB of float32 by all threads."""
    numbers = torch.ones(2**26)
    return numbers.nbytes / 1e9 / min(timed(numbers.sum) for _ in range(9))
