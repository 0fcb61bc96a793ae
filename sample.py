"""
Generate text with a trained model, printed as it is drawn. The text goes to stdout, everything else to stderr.

From the last checkpoint in out_dir, MHA or MLA (the checkpoint records which):
$ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
$ python sample.py --start=FILE:prompt.txt --max_new_tokens=200 --temperature=0 --num_samples=1 > text.txt

From a model whose tokens stand for no text, ids (this one comes with the repository):
$ python sample.py --out_dir=models/repeats-mla --start='5 9 5 9 5' --num_samples=1

One long text on a CPU, fastest: weights in int8 and a compiled step (compiling takes up to a minute):
$ python sample.py --out_dir=out-shakespeare-char --num_samples=1 --weights=int8 --compile=True

From OpenAI's GPT-2 ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'), a Hugging Face folder or a GGUF file:
$ python sample.py --init_from=gpt2-xl --start="What is the answer?" --top_k=0 --top_p=0.95 --stop="<|endoftext|>"
"""

from core.cli.keys import begin

begin(__file__)  # before the slow imports

import codecs
import os
import sys
import time
from pathlib import Path

import torch

from core.cli import errors, machine
from core.cli.errors import UserError, printable
from core.convert.bits import for_few_bits
from core.convert.int8 import quantize
from core.runs import checkpoint as checkpoints
from core.runs import evaluation, models
from core.text.dataset import TokenData
from core.text.meta import meta_of_dataset
from core.text.prompt import prompt_ids, prompt_text
from core.text.tokenizer import NO_TEXT, GPT2Tokenizer, IdTokenizer, load_tokenizer, tokenizer_of

# ----------------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume' (the checkpoint in out_dir), 'gpt2-xl', a Hugging Face folder or a GGUF file
out_dir = 'out'  # a folder with ckpt.pt, or a checkpoint file; ignored unless init_from is 'resume'
data_dir = 'data'  # where the meta.pkl of a nanoGPT checkpoint is, which doesn't hold its own characters
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file
num_samples = 10  # decoded as one batch; the first is printed while it is drawn
max_new_tokens = 500
temperature = 0.8  # 1: the model's own distribution; below 1: sharper; 0: greedy
top_k = 200  # draw from the top_k most likely tokens; 0: from all
top_p = 1.0  # draw from the smallest set of tokens with this total probability; 1: from all
stop = ''  # a token that ends a sample, for example '<|endoftext|>' or '.'; empty: none
context = 0  # tokens that the model sees at most; 0: as in training, more only without learned positions
use_cache = True  # False: recompute the whole context for each token, as nanoGPT does
cache = 'float'  # 'int8', 'int4': what is cached in so many bits: less memory, slightly other probabilities
seed = 1337
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'
weights = 'float'  # 'int8', 'int4': weights in so many bits, on a CPU: faster, with slightly other probabilities
int8_windows = 0  # with int8 or int4: measure on so many validation windows what it changes
compile = 'auto'  # the decode step: 'auto' (a CUDA graph on CUDA), True (on a CPU: torch.compile), or False
threads = 0  # CPU threads; 0: as many as the cores that this process may use
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# ----------------------------------------------------------------------------------------------------------------------

# ---- machine ---------------------------------------------------------------------------------------------------------
if cache != 'float' and not use_cache:
    raise UserError(f'cache={cache} needs a cache; leave it out, or use_cache=False')
device = machine.pick_device(device)
machine.set_threads(threads)
torch.set_float32_matmul_precision('high')  # TF32 for what stays float32 on a GPU
captured = device.startswith('cuda') and compile in ('auto', True)
compiled = device == 'cpu' and compile is True
if compiled and dtype == 'auto':
    dtype = 'float32'  # autocast would convert the weights in every step
if compile is True and not (captured or compiled):
    raise UserError(f'compile=True is for a CPU or an NVIDIA GPU, and the device is {device}; leave it out')
if compile is True and not use_cache:
    raise UserError('compile=True compiles a step with a cache; leave it out, or use_cache=False')
if compiled:
    machine.prepare_compiler(device)

# ---- model and tokenizer ---------------------------------------------------------------------------------------------
if init_from == 'resume':
    checkpoint = checkpoints.load(out_dir)
    model = models.build_model(checkpoint)
else:
    model, checkpoint = models.pretrained(init_from)
# nanoGPT records only the data set's name, and its folders without a meta file hold GPT-2's tokens
named = (checkpoint.get('config') or {}).get('dataset')
meta = checkpoint.get('tokenizer') or meta_of_dataset(data_dir, named)
if not meta and 'model' not in checkpoint:  # a published model without a tokenizer
    guess = tokenizer_of({}, model.config.vocab_size)
    meta = guess.meta() if guess else {'tokenizer': NO_TEXT}
elif not meta:
    meta = GPT2Tokenizer().meta()
    errors.notice(f"the checkpoint records no tokenizer, and there is no {data_dir}/{named}: using GPT-2's")
if context:
    try:
        model.set_context(context)
    except ValueError as error:
        raise UserError(f'context={context} is too much: {error}') from error
model = for_few_bits(model.eval(), cache).to(device)
dtype = machine.pick_dtype(dtype, device, model.config.n_embd)
if meta.get('tokenizer') == NO_TEXT:
    tokenizer, start = IdTokenizer(model.config.vocab_size), start if 'start' in given else '0'
    errors.notice("the model's tokens stand for no text here: prompt and samples are ids, as in --start='5 9 5'")
else:
    tokenizer = load_tokenizer(meta)
if tokenizer.n_vocab > model.config.vocab_size:
    sizes = f'the model has {model.config.vocab_size} tokens, and the tokenizer ({tokenizer.name}) {tokenizer.n_vocab}'
    raise UserError(f"{sizes}; put the meta.pkl or meta.json of the model's data set into its folder under --data_dir")

# ---- weights in few bits ---------------------------------------------------------------------------------------------


def validation_losses():
    """The model's loss on each of `int8_windows` windows of its validation data."""
    data = TokenData(Path(data_dir, str((checkpoint.get('config') or {}).get('dataset', ''))), model.config.block_size)
    with machine.autocast(device, dtype):
        return evaluation.window_losses(model, data, 'val', int8_windows, batch_size=1)


size, precision = model.get_num_params() / 1e6, dtype
if weights == 'float' and int8_windows:
    raise UserError('int8_windows is about weights in int8 or int4; add --weights=int8, or leave it out')
if weights != 'float':
    if device != 'cpu':
        raise UserError(f"weights='{weights}' is for a CPU; leave it out, or add --device=cpu")
    dtype = 'float32' if model.lm_head.weight.dtype == torch.float32 else dtype  # the rest needs no autocast
    before = validation_losses() if int8_windows else None
    quantize(model, weights)
    products = 'float32' if compiled and weights == 'int8' and num_samples == 1 else 'bfloat16'
    precision = f'weights in {weights}, their products in {products}, the rest in {dtype}'
    if int8_windows:
        rise, error = evaluation.mean_and_stderr(validation_losses() - before)
        errors.notice(f'{weights} changes the validation loss of {before.mean():.4f} by {rise:+.5f} +- {error:.5f}')

# ---- prompt ----------------------------------------------------------------------------------------------------------
prompt = prompt_ids(tokenizer, prompt_text(start, tokenizer), is_default='start' not in given)
if len(prompt) > model.config.block_size:
    errors.notice(f'the prompt has {len(prompt)} tokens; the model sees the last {model.config.block_size}')
stop_ids = tokenizer.encode(stop, special=True)
if len(stop_ids) > 1:
    raise UserError(f'stop must be one token, and {stop!r} is {len(stop_ids)} ({tokenizer.name}); choose a shorter one')
stop_token = stop_ids[0] if stop_ids else None

# ---- text ------------------------------------------------------------------------------------------------------------
sys.stdout.reconfigure(encoding='utf-8', errors='backslashreplace')
decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
in_terminal = sys.stdout.isatty()  # which would execute control characters; a file gets what the model wrote


def show(ids, final=False):
    """Print token ids at once; a character whose bytes span several tokens appears with the last of them."""
    text = decoder.decode(tokenizer.decode_bytes(ids), final)
    sys.stdout.write(printable(text) if in_terminal else text)
    sys.stdout.flush()


def show_first(tokens):
    """Print the first sample's newest token, from tokens (num_samples,). A finished sample repeats stop_token."""
    token = tokens[0].item()
    show([] if token == stop_token else [token])


cache_bytes = model.init_cache(1, 1, machine.DTYPES[dtype], cache).bytes_per_token
cached = f'the cache takes {cache_bytes:,} bytes per token' if use_cache else 'no cache'
errors.notice(f'{models.attention_of(model).upper()}, {size:.2f}M parameters, {device}, {precision}; {cached}')
drawing = dict(temperature=temperature, top_k=top_k or None, top_p=top_p, num_samples=num_samples)
drawing |= dict(stop_token=stop_token, valid_ids=tokenizer.n_vocab)
decoding = dict(use_cache=use_cache, cache=cache, fixed=captured, compiled=compiled)
began = time.perf_counter()
show(prompt)
with machine.autocast(device, dtype):
    ids, generator = torch.tensor([prompt], device=device), torch.Generator(device).manual_seed(seed)
    samples = model.generate(ids, max_new_tokens, on_token=show_first, generator=generator, **drawing, **decoding)
seconds = time.perf_counter() - began
show([], final=True)
print('\n---------------')
for sample in samples[1:].tolist():
    show(prompt + [token for token in sample[len(prompt) :] if token != stop_token], final=True)
    print('\n---------------', flush=True)
drawn = samples[:, len(prompt) :].numel()
errors.notice(f'{drawn} tokens in {seconds:.1f} s, {drawn / seconds:.1f} tokens/s')
