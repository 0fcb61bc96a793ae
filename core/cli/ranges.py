"""
Which values a key of a script may have: one interval or list of choices per key, the same in every script.

Upper bounds exclude typos that would fill the memory or never finish; real limits depend on the machine, and those of a
model's sizes on one another (GPTConfig, MLAConfig).
"""

import math

# the keys of each interval; as mathematics writes them, [ and ] include the end, ( and ) exclude it
KEYS = {
    # the model
    '[1, 16777216]': 'block_size contexts min_period prompt_tokens',
    '[0, 4294967296]': 'vocab_size top_k',
    '[1, 1000]': 'n_layer controls',
    '[1, 65536]': 'n_head n_embd n_latents n_kv_heads sweep',
    '[0, 65536]': 'n_kv_head n_latent n_latent_q n_rope n_nope n_value',
    '[0, 1048576]': 'n_hidden',
    '[1, 1000000000000]': 'rope_theta statistics_tokens',
    '[0, 1)': 'dropout beta1 beta2',
    '(0, 10]': 'init_std',
    # training, and how often something is done
    '[1, 1000000]': 'batch_size batch_sizes gradient_accumulation_steps rounds most show gpus',
    '[1, 1000000000]': 'eval_interval eval_iters log_interval max_new_tokens rows val_rows',
    '[0, 1000000000]': (
        'max_iters warmup_iters lr_decay_iters checkpoint_interval keep_checkpoints iterations int8_windows '
        'uncached_tokens price'
    ),
    '(0, inf)': 'learning_rate rate rates',
    '[0, inf)': 'min_lr weight_decay grad_clip',
    '(0, 1]': 'kv_lr top_p',
    # the machine and randomness
    '[0, 1024]': 'threads workers jobs',
    '[0, 9223372036854775807]': 'seed split_seed',
    '[0, 1000]': 'seeds tuning_seeds final_seeds most_seeds',
    '(0, 100000]': 'minutes',
    '[0, 86400]': 'follow',
    # samples and measurements
    '[1, 100000]': 'num_samples ablate_sequences few best drawn',
    '[0, 100]': 'temperature kv_rms',
    '[8, 100000]': 'sequences',
    '[4, 1000000]': 'length',
    '[100, 1000000]': 'resamples',
    '[2, 1000000]': 'text_windows',
    '[2, 1000000000]': 'windows',
    '[2, 1000000000000]': 'eval_tokens',
    '[0, 16777216]': 'new_tokens context',
    '[0.01, 1]': 'usable',
    '[0.001, 1]': 'mfu',
    # data
    '[0, 1000000]': 'sample_tokens megabytes',
    '(0, 1)': 'val_fraction',
    '[0, 1000000000000]': 'drawn_from',
    '[1, 1000000000000000000]': 'tokens',
    '[0, 1000000000000000000]': 'shard_tokens',
}
BOUNDS = {key: interval for interval, keys in KEYS.items() for key in keys.split()}
CHOICES = {
    'attention': ('mha', 'mla'),
    'attention_kernel': ('auto', 'cudnn', 'flash', 'fa3'),
    'optimizer': ('adamw', 'muon'),
    'blocks': ('modern', 'gpt2'),
    'weights': ('float', 'int8', 'int4'),
    'cache': ('float', 'int8', 'int4'),
    'basis': ('', 'hadamard', 'components', 'balanced'),
    'resume': ('no', 'yes', 'auto'),
    'compile': ('auto', True, False),
    'dtype': ('auto', 'float32', 'bfloat16', 'float16'),
    'method': ('data', 'weights'),
    'documents': ('file', 'line'),
    'format': ('hf', 'gguf'),
}
TEXTS = ('start', 'stop')  # may contain any character; all other strings are names, paths or lists of them


def problem(key: str, value: object) -> str | None:
    """What is wrong with the value of a key, as a clause ('is -1; it must be ...'), or None. A list is a str here."""
    if key in CHOICES and value not in CHOICES[key]:
        return f"is '{value}'; it must be {listed([str(choice) for choice in CHOICES[key]])}"
    if key in BOUNDS and isinstance(value, (int, float)) and not isinstance(value, bool) and not inside(key, value):
        return f'is {short(value)}; it must be {in_words(BOUNDS[key])}'
    if isinstance(value, str) and '\0' in value and key not in TEXTS:
        return f'is {value!r}; a name or path cannot contain the character \\0'
    return None


def ends(interval: str) -> tuple[float, float]:
    """The two ends of an interval such as '[0, 1)', as numbers; whole ones stay exact."""
    low, high = (float(end) if end == 'inf' or '.' in end else int(end) for end in interval[1:-1].split(', '))
    return low, high


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


def short(value: object, most: int = 40) -> str:
    """A value as an error message shows it: its first characters, at most so many."""
    text = str(value)
    return text if len(text) <= most else text[: most - 3] + '...'


def listed(words: list[str], last: str = 'or') -> str:
    """'a, b or c'."""
    return f' {last} '.join([', '.join(words[:-1])] * (len(words) > 1) + [words[-1]])
