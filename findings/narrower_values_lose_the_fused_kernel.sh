#!/usr/bin/env bash
# On a CPU, attention whose values are narrower than its keys loses the fused kernel: less work takes more time.
#
# Libraries: torch 2.13.0, numpy 2.4.6 (Python 3.11 or later).
# What was done: scaled_dot_product_attention runs on 4 heads and 1024 positions with keys of 192 numbers, as in
#   DeepSeek-V3's attention, and values of 192, then of 128 (DeepSeek-V3's own), then of 128 padded to 192 with zeros
#   and cut afterwards. A profile names the kernel and gives the largest memory that one operation takes; the time is
#   that of one thread, the best of five.
# What one would guess: narrower values are less work, so they take at most the same time and memory; widths may differ,
#   since the documentation gives the value a width of its own.
# What happens: the fused kernel for CPUs wants one width for all three. Otherwise the plain formula runs, silently, and
#   the scores of all pairs of positions are written out: memory grows with the square of the length. Padding the values
#   with zeros computes more and gives the same numbers to rounding, in a fraction of the time and the memory. The two
#   kernels have the same name in a model's configuration (sdpa), so nothing there shows which one runs.
#
# Output seen (times differ between machines; kernels and memory don't):
#   float32              kernel                    largest piece of memory      time
#     values of 192      flash_attention_for_cpu                    3.1 MB      21.5 ms
#     values of 128      attention_math                            16.8 MB      40.8 ms
#     128, padded        flash_attention_for_cpu                    3.1 MB      21.7 ms
#   bfloat16             kernel                    largest piece of memory      time
#     values of 192      flash_attention_for_cpu                    1.6 MB       5.6 ms
#     values of 128      attention_math                            16.8 MB      53.9 ms
#     128, padded        flash_attention_for_cpu                    1.6 MB       6.0 ms
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Runs attention with values as wide as the keys, with narrower ones, and with narrower ones padded to the keys."""

import time

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.profiler import profile

HEADS, LENGTH, WIDTH, NARROW = 4, 1024, 192, 128
torch.set_num_threads(1)
torch.manual_seed(0)


def padded(q, k, v):
    wide = pad(v, (0, q.size(-1) - v.size(-1)))
    return scaled_dot_product_attention(q, k, wide, is_causal=True)[..., : v.size(-1)]


def plain(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def measure(function, *inputs):
    function(*inputs)
    with profile(profile_memory=True) as trace:
        function(*inputs)
    kernels = [event.name for event in trace.events() if event.name.startswith('aten::_scaled_dot_product')]
    memory = max(event.self_cpu_memory_usage for event in trace.events())
    times = []
    for _ in range(5):
        start = time.process_time()
        out = function(*inputs)
        times.append(time.process_time() - start)
    return out, kernels[0].removeprefix('aten::_scaled_dot_product_'), memory / 1e6, min(times) * 1e3


for dtype in (torch.float32, torch.bfloat16):
    print(f'{str(dtype).removeprefix("torch."):20} kernel                    largest piece of memory      time')
    q, k, v = torch.randn(3, 1, HEADS, LENGTH, WIDTH).to(dtype)
    results = {}
    for name, function, values in (
        (f'values of {WIDTH}', plain, v),
        (f'values of {NARROW}', plain, v[..., :NARROW].contiguous()),
        (f'{NARROW}, padded', padded, v[..., :NARROW].contiguous()),
    ):
        results[name] = out, kernel, memory, ms = measure(function, q, k, values)
        print(f'  {name:18} {kernel:25} {memory:20.1f} MB {ms:9.1f} ms')
    wide, narrow, mended = results.values()
    assert (mended[0] - narrow[0]).abs().max() < (1e-4 if dtype is torch.float32 else 0.05)
    assert wide[1] == mended[1] == 'flash_attention_for_cpu', 'the behavior has changed'
    assert narrow[1] == 'attention_math', 'the behavior has changed'
    assert narrow[2] >= HEADS * LENGTH**2 * 4 / 1e6 > 4 * mended[2], 'the behavior has changed'
    assert narrow[3] > 1.2 * mended[3], 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py"
