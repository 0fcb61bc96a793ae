"""A study whose models are measured on few sequences: quick_study.py studies/NAME.py --key=value"""

import os
import runpy
import sys

sys.path.insert(0, os.getcwd())
from studies import measure  # noqa: E402

FEW = dict(sequences=8, resamples=100, controls=1, ablate_sequences=2, text_windows=4)
as_it_is = measure.measure

if __name__ == '__main__':
    measure.measure = lambda folder, **keys: as_it_is(folder, **keys | FEW)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name='__main__')
