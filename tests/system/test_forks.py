"""The forks in which tests run programs end as Python does."""

from support import forking

LEFT = """
import sys
from concurrent.futures import ThreadPoolExecutor

sys.kept = pool = ThreadPoolExecutor(2)  # torch.compile keeps one
print(list(pool.map(abs, [-1, -2])))
"""


def test_a_program_that_leaves_a_pool_of_threads_ends(tmp_path):
    """Its threads wait for work until they are told to end, which Python does before it joins them."""
    (tmp_path / 'left.py').write_text(LEFT)
    done = forking.run(str(tmp_path / 'left.py'), [], seconds=60)
    assert (done.returncode, done.stdout) == (0, '[1, 2]\n'), done.stderr
