"""core/speed/timing.py: turns by a clock that the test advances, memory by allocations of known size."""

import itertools
import time

import pytest
import torch

from core.speed import timing


class Clock:
    """A clock that functions made by `takes` advance, and a log of their calls."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(time, 'perf_counter', lambda: self.now)

    def takes(self, name, seconds, after_another=0.0):
        """A function whose call takes `seconds`, and `after_another` more when another one was called before it."""

        def function():
            self.now += seconds + after_another * (self.calls[-1:] != [name])
            self.calls.append(name)

        return function


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def turns(calls):
    """[(name, calls in a row)]."""
    return [(name, len(list(run))) for name, run in itertools.groupby(calls)]


def test_contenders_alternate_and_every_second_round_is_reversed(clock):
    contenders = {name: clock.takes(name, seconds) for name, seconds in (('a', 1), ('b', 2), ('c', 3))}
    seconds = timing.alternate(contenders, rounds=4)
    assert seconds == {'a': [1] * 4, 'b': [2] * 4, 'c': [3] * 4}
    rounds = [''.join(clock.calls[i : i + 3]) for i in range(0, len(clock.calls), 3)]
    assert len(rounds) == 5 and all(sorted(order) == ['a', 'b', 'c'] for order in rounds)
    assert all(order == following[::-1] for order, following in zip(rounds, rounds[1:], strict=False))


def test_a_slow_contender_is_called_less_often_per_turn_and_the_first_of_several_calls_is_not_timed(clock):
    fast, slow = clock.takes('fast', 1, after_another=0.5), clock.takes('slow', 10)
    seconds = timing.alternate({'fast': fast, 'slow': slow}, rounds=6, turn=4.0)
    assert seconds['fast'] == [1.0] * 6, 'the call after another contender takes 1.5 s and must not be timed'
    assert seconds['slow'] == [10.0] * 6
    warm_up, rounds = clock.calls[:4], clock.calls[4:]
    assert warm_up == ['slow', 'slow', 'fast', 'fast']
    # four timed calls fill a turn of 4 s; turns join where a contender ends one round and begins the next
    joined = [('slow', 2), ('fast', 10)]
    assert turns(rounds) == [('fast', 5), *joined, *joined, ('slow', 2), ('fast', 5)]


def test_a_time_is_that_of_one_call(clock):
    work = clock.takes('work', 8)
    assert timing.timed(work) == timing.timed(lambda: work() or 4, calls=3) == 8 and len(clock.calls) == 4


def test_median_and_quartiles_resist_an_outlier():
    assert timing.spread([0.002]) == {'ms': 2.0, 'ms_quartiles': [2.0, 2.0]}
    row = timing.spread([0.001, 0.002, 0.003, 0.004, 9.0])
    assert row == {'ms': pytest.approx(3), 'ms_quartiles': [pytest.approx(2), pytest.approx(4)]}
    assert timing.ms_text(row) == '3.0 (2.0 to 4.0)'


def test_peak_memory_counts_what_is_held_at_once():
    before, block = torch.ones(1 << 20), 4 << 20

    def one_after_another():
        for _ in range(3):
            before.clone()

    def together():
        return [before.clone() for _ in range(3)]

    assert timing.peak_bytes(one_after_another) == pytest.approx(block, rel=0.01)
    assert timing.peak_bytes(together) == pytest.approx(3 * block, rel=0.01)


def test_a_profile_is_a_trace_and_names_the_longest_operation_first(tmp_path):
    a = torch.ones(300, 300)
    shares = timing.profile(lambda: a @ a @ a @ a, str(tmp_path / 'trace.json'))
    assert shares[0][0] == 'mm' and sum(share for _, share in shares) == pytest.approx(1)
    assert '"traceEvents"' in (tmp_path / 'trace.json').read_text()


@pytest.mark.slow
def test_the_machine_is_named_and_its_rate_is_plausible():
    assert timing.describe_machine('cpu', 'float32')['device'] == timing.cpu_name() != ''
    assert 1e8 < timing.cpu_flops('float32') < 1e15
    assert 0.1 < timing.cpu_bandwidth() < 1e4
