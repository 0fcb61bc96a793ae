"""
The tests of this folder run where there is a CUDA GPU, and are skipped elsewhere.

REHEARSE_GPU=1 runs those on the CPU that don't need what only CUDA has, each with its first parameters: it shows that
they run.
"""

import os
from pathlib import Path

import pytest
import torch

REHEARSAL = bool(os.environ.get('REHEARSE_GPU')) and not torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    rehearsed = set()
    for item in items:
        if Path(__file__).parent not in item.path.parents or torch.cuda.is_available():
            continue
        if not REHEARSAL or item.get_closest_marker('cuda') or item.function in rehearsed:
            item.add_marker(pytest.mark.skip(reason='needs a CUDA GPU'))
        else:
            rehearsed.add(item.function)


@pytest.fixture(params=['0', pytest.param('1', marks=pytest.mark.cuda)])
def device(request):
    """'cuda:0', and 'cuda:1' where there are two GPUs; 'cpu' in a rehearsal."""
    if REHEARSAL:
        return 'cpu'
    if int(request.param) >= torch.cuda.device_count():
        pytest.skip('needs two CUDA GPUs')
    return f'cuda:{request.param}'
