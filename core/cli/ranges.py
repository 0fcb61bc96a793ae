"""
Which values a key of a script may have: one interval or list of choices per key, whatever scripts have it.

keys.py checks every key against these tables, whether the command line or a config file sets it. A key means the same
in every script, so it has the same bounds in all of them. Upper bounds exclude typos that would fill the memory or
never finish; real limits depend on the machine, and those of a model's sizes on one another (GPTConfig, MLAConfig).
"""

import math

# intervals as mathematics writes them: [ and ] include the end, ( and ) exclude it
BOUNDS = {
    # the model
    'block_size': '[1, 16777216]',
    'vocab_size': '[0, 4294967296]',
    'n_layer': '[1, 1000]',
    'n_head': '[1, 65536]',
    'n_embd': '[1, 65536]',
    'n_kv_head': '[0, 65536]',
    'n_latent': '[0, 65536]',
    'n_latent_q': '[0, 65536]',
    'n_rope': '[0, 65536]',
    'n_nope': '[0, 65536]',
    'n_value': '[0, 65536]',
    'n_hidden': '[0, 1048576]',
    'rope_theta': '(0, 1000000000000]',
    'kv_rms': '[0, 100]',
    'n_latents': '[1, 65536]',
    'n_kv_heads': '[1, 65536]',
    'dropout': '[0, 1)',
    'init_std': '(0, 10]',
    # training
    'batch_size': '[1, 1000000]',
    'gradient_accumulation_steps': '[1, 1000000]',
    'max_iters': '[0, 1000000000]',
    'warmup_iters': '[0, 1000000000]',
    'lr_decay_iters': '[0, 1000000000]',
    'eval_interval': '[1, 1000000000]',
    'eval_iters': '[1, 1000000000]',
    'log_interval': '[1, 1000000000]',
    'checkpoint_interval': '[0, 1000000000]',
    'keep_checkpoints': '[0, 1000000000]',
    'learning_rate': '(0, inf)',
    'rates': '(0, inf)',
    'min_lr': '[0, inf)',
    'kv_lr': '(0, 1]',
    'weight_decay': '[0, inf)',
    'beta1': '[0, 1)',
    'beta2': '[0, 1)',
    'grad_clip': '[0, inf)',
    # the machine and randomness
    'threads': '[0, 1024]',
    'workers': '[0, 1024]',
    'jobs': '[0, 1024]',
    'seed': '[0, 9223372036854775807]',
    'split_seed': '[0, 9223372036854775807]',
    'seeds': '[0, 1000]',
    'tuning_seeds': '[0, 1000]',
    'final_seeds': '[0, 1000]',
    'control_seeds': '[0, 1000]',
    'iterations': '[0, 1000000000]',
    'minutes': '(0, 100000]',
    # sampling
    'num_samples': '[1, 100000]',
    'max_new_tokens': '[1, 1000000000]',
    'sample_tokens': '[0, 1000000]',
    'temperature': '[0, 100]',
    'top_k': '[0, 4294967296]',
    'top_p': '(0, 1]',
    # conversion
    'eval_tokens': '[2, 1000000000000]',
    'statistics_tokens': '[1, 1000000000000]',
    'sweep': '[1, 65536]',
    # induction heads
    'sequences': '[8, 100000]',
    'length': '[4, 1000000]',
    'controls': '[1, 1000]',
    'resamples': '[100, 1000000]',
    'ablate_sequences': '[1, 100000]',
    'text_windows': '[2, 1000000]',
    'windows': '[2, 1000000000]',
    'follow': '[0, 86400]',
    'show': '[1, 1000000]',
    # measuring speed
    'rounds': '[1, 1000000]',
    'most': '[1, 1000000]',
    'contexts': '[1, 16777216]',
    'batch_sizes': '[1, 1000000]',
    'int8_windows': '[0, 1000000000]',
    'uncached_tokens': '[0, 1000000000]',
    'new_tokens': '[0, 16777216]',
    'prompt_tokens': '[1, 16777216]',
    'megabytes': '[0, 1000000]',
    'tolerance': '(0, 1000]',
    # sizes, hours and cost
    'gpus': '[1, 1000000]',
    'usable': '[0.01, 1]',
    'mfu': '[0.001, 1]',
    'tokens': '[1, 1000000000000000000]',
    'price': '[0, 1000000000]',
    # data
    'val_fraction': '(0, 1)',
    'rows': '[1, 1000000000]',
    'val_rows': '[1, 1000000000]',
    'min_period': '[1, 16777216]',
    'drawn_from': '[0, 1000000000000]',
    'shard_tokens': '[0, 1000000000000000000]',
}
CHOICES = {
    'attention': ('mha', 'mla'),
    'optimizer': ('adamw', 'muon'),
    'weights': ('float', 'int8'),
    'resume': ('no', 'yes', 'auto'),
    'compile': ('auto', True, False),
    'dtype': ('auto', 'float32', 'bfloat16', 'float16'),
    'method': ('data', 'weights'),
    'documents': ('file', 'line'),
}
TEXTS = ('start', 'stop')  # may contain any character; all other strings are names, paths or lists of them


def problem(key: str, value: object) -> str | None:
    """What is wrong with the value of a key, as a clause ('is -1; it must be ...'), or None. A list is a str here."""
    if key in CHOICES and value not in CHOICES[key]:
        return f"is '{value}'; it must be {listed([str(choice) for choice in CHOICES[key]])}"
    if key in BOUNDS and isinstance(value, (int, float)) and not isinstance(value, bool) and not inside(key, value):
        text = str(value)
        return f'is {text if len(text) <= 40 else text[:37] + "..."}; it must be {in_words(BOUNDS[key])}'
    if isinstance(value, str) and '\0' in value and key not in TEXTS:
        return f'is {value!r}; a name or path cannot contain the character \\0'
    return None


def ends(interval: str) -> tuple[float, float]:
    """The two ends of an interval such as '[0, 1)', as numbers."""
    low, high = interval[1:-1].split(', ')
    return number(low), number(high)


def number(text: str) -> float:
    """The end of an interval: whole ones stay exact."""
    return float(text) if text == 'inf' or '.' in text else int(text)


def inside(key: str, value: float) -> bool:
    """True where the interval of `key` holds a number. NaN and infinity are in no interval."""
    interval = BOUNDS[key]
    low, high = ends(interval)
    above = value >= low if interval[0] == '[' else value > low
    below = value <= high if interval[-1] == ']' else value < high
    return above and below


def in_words(interval: str) -> str:
    """'at least 0 and below 1' for '[0, 1)'."""
    low, high = ends(interval)
    lowest = f'at least {low:,}' if interval[0] == '[' else f'above {low:,}'
    if high == math.inf:
        return f'{lowest} and finite'
    return f'{lowest} and {"at most" if interval[-1] == "]" else "below"} {high:,}'


def listed(words: list[str]) -> str:
    """'a, b or c'."""
    return ' or '.join([', '.join(words[:-1])] * (len(words) > 1) + [words[-1]])
