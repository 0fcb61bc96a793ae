"""core/cli/ranges.py: every numeric key of a script has bounds that hold its default; what is outside is said."""

from dataclasses import fields

import pytest
from support.keys import ROOT, SCRIPTS, keys_of

from core.cli import ranges
from model import GPTConfig
from model_mla import MLAConfig

LEAST = dict(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1)


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_numeric_key_has_bounds_that_hold_its_default(script):
    keys = keys_of(script)
    assert keys
    for key, default in keys.items():
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert key in ranges.BOUNDS, key
        assert ranges.problem(key, default) is None


def test_no_bounds_are_left_over():
    used = {key for script in SCRIPTS for key in keys_of(script)}
    assert set(ranges.BOUNDS) | set(ranges.CHOICES) <= used


@pytest.mark.parametrize(
    ('key', 'inside', 'outside'),
    [
        ('dropout', [0, 0.5, 0.999], [-1e-9, 1, 1.5, float('nan'), float('inf')]),
        ('learning_rate', [1e-300, 1, 1e38], [0, -1, float('inf'), float('nan')]),
        ('top_p', [1e-9, 1], [0, 1.0001]),
        ('threads', [0, 1, 1024], [-1, 1025, 1e30]),
        ('n_layer', [1], [0, -1, 10**30]),
        ('compile', [True, False, 'auto'], ['yes', 'true']),
    ],
)
def test_ends_of_intervals(key, inside, outside):
    assert all(ranges.problem(key, value) is None for value in inside)
    assert all(ranges.problem(key, value) for value in outside)


def test_the_message_says_what_would_be_right():
    assert ranges.problem('dropout', 1.5) == 'is 1.5; it must be at least 0 and below 1'
    assert ranges.problem('learning_rate', 0) == 'is 0; it must be above 0 and finite'
    assert ranges.problem('threads', -1) == 'is -1; it must be at least 0 and at most 1,024'
    assert ranges.problem('attention', 'gqa') == "is 'gqa'; it must be mha or mla"
    assert ranges.problem('compile', 'maybe') == "is 'maybe'; it must be auto, True or False"


@pytest.mark.parametrize('config_class', [GPTConfig, MLAConfig])
def test_the_command_line_and_the_models_say_the_same(config_class):
    """What no model can have, the command line refuses; what it admits at least, a model can have."""
    checked = set()
    for field in fields(config_class):
        if field.name in ranges.BOUNDS and field.name != 'vocab_size':  # 0 is a script's way to say: that of the data
            low, _ = ranges.ends(ranges.BOUNDS[field.name])
            admitted, refused = (low, low - 1) if ranges.inside(field.name, low) else (low + 1e-6, low)
            config_class(**{**LEAST, field.name: admitted})
            assert ranges.problem(field.name, refused)
            if field.name != 'init_std':  # any spread makes a model; 0 is no start for training
                with pytest.raises(ValueError, match=field.name):
                    config_class(**{**LEAST, field.name: refused})
            checked.add(field.name)
        for choice in ranges.CHOICES.get(field.name, ()):
            config_class(**{**LEAST, 'n_embd': 4, field.name: choice})
            with pytest.raises(ValueError, match=field.name):
                config_class(**{**LEAST, 'n_embd': 4, field.name: f'not {choice}'})
            checked.add(field.name)
    assert {'block_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head', 'dropout'} <= checked
