"""The tests of this folder run where there is a CUDA GPU, and are skipped elsewhere."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason='needs a CUDA GPU'))
