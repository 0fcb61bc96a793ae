"""
Write a model as a folder that the `transformers` library loads, or as a GGUF file that llama.cpp runs.

$ python export_hf.py --source=out-shakespeare-cpu --out_dir=hf-shakespeare
$ python export_hf.py --source=out-modern-cpu --out_dir=gguf-modern --format=gguf

Wherever a class of transformers' own can express the model, it becomes that class, which other engines serve too
(docs/serving.md):

    MHA, GQA   LlamaForCausalLM with norm='rms', mlp='swiglu', pos='rope' and no biases; otherwise an ordinary GPT-2
    MLA        DeepseekV3ForCausalLM with the same and latent_norm=True; otherwise it comes with its code in one file,
               core/convert/hf_modeling_mla.py, which transformers runs only with trust_remote_code

    AutoModelForCausalLM.from_pretrained('hf-shakespeare')
    AutoModelForCausalLM.from_pretrained('hf-shakespeare-mla', trust_remote_code=True)

The tokenizer requires no code. AutoTokenizer reads the model's config first, though, and on a terminal it asks whether
to run such a model's code. AutoTokenizer.from_pretrained(folder, trust_remote_code=False) neither asks nor runs it.

Pipelines, trainers and EleutherAI's lm_eval require an end-of-text and a padding token, whose ids must be the model's:

    gpt2, bpe  <|endoftext|> is both, and the start of a text. Generation stops at it.
    byte       byte 0, which occurs in no text
    char       the character that text can best do without, since all ids are taken: a control character, else a symbol,
               else a punctuation mark, ... ('$' in Shakespeare). It stands for unknown characters too.

For bytes and characters, no document ended with that token in training. So generate() doesn't stop at it, and they have
no token for the start of a text: --model_args ...,prefix_token_id=ID gives lm_eval a better one, such as a newline's.
decode(..., skip_special_tokens=True) omits the token; no logits and no other ids are changed.
"""

from core.cli.keys import begin

begin(__file__)  # before the slow imports

import os
import shlex
import shutil
from dataclasses import fields

from core.cli import arguments, errors, files
from core.cli.errors import UserError
from core.cli.keys import keys_of
from core.convert import gguf_file, gpt2, hf_tokenizer, published
from core.convert.factorize import to_mha
from core.runs import models
from core.text.tokenizer import tokenizer_of

# ----------------------------------------------------------------------------------------------------------------------
source = 'out'  # a checkpoint, a folder with one, or whatever else sample.py's init_from takes
out_dir = 'hf-model'  # the folder to write
format = 'hf'  # 'gguf': write out_dir/model.gguf, in float32
overwrite = False  # write into a folder that is not empty
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# ----------------------------------------------------------------------------------------------------------------------

MODEL_CODE = 'hf_modeling_mla.py'  # of core/convert/
INDEX = 'model.safetensors.index.json'  # of a model in several files, which ours isn't
# all that an export may write, and replaces or removes where it's written again; config.json, which is read first, last
NAMES = ('README.md', MODEL_CODE, *hf_tokenizer.FILES, INDEX, 'model.safetensors', 'generation_config.json')
NAMES += ('config.json',)
GGUF_NAMES = ('model.gguf',)
arguments.check_folder(out_dir)
if os.path.isdir(out_dir) and os.listdir(out_dir) and not overwrite:
    raise UserError(f'{out_dir} is not empty; choose another --out_dir, or write into it with --overwrite=True')
model, saved = models.pretrained(source)
meta = saved.get('tokenizer') or {}
is_mla, label = models.attention_of(model) == 'mla', models.label_of(model.config)
parameters, cache = model.get_num_params(non_embedding=False), model.init_cache(1).bytes_per_token
form = published.native_form(model.config)
misfit = form.misfit(model.config) or 'attention=mla' * (is_mla and format == 'gguf')
if unknown := published.unknown_setting(model.config):
    raise UserError(f'a model with {unknown} cannot be exported: no format here knows that setting')
# what MODEL_CODE can't express otherwise
FIXED = dict(norm=('layer',), mlp=('gelu',), n_hidden=(0, 4 * model.config.n_embd), shared_rope=(True,))


# ---- weights and config ----------------------------------------------------------------------------------------------
def mla_config():
    """The config of the classes in MODEL_CODE, which auto_map names to the auto classes."""
    # in MLA all heads share one latent, and how the weights began is of no use
    for name, known in FIXED.items():
        if (value := getattr(model.config, name)) not in known:
            raise UserError(
                f'no class has such a model: {form.CLASS} has no {misfit}, and {MODEL_CODE} no {name}={value}'
            )
    without = {*FIXED, 'n_kv_head', 'tied'}
    names = [field.name for field in fields(model.config) if field.name in published.KNOWN - without]
    sizes = {name: getattr(model.config, name) for name in names}
    module = MODEL_CODE.removesuffix('.py')
    classes = {
        'AutoConfig': 'MLAGPTConfig',
        'AutoModel': 'MLAGPTModel',
        'AutoModelForCausalLM': 'MLAGPTForCausalLM',
        'AutoModelForSequenceClassification': 'MLAGPTForSequenceClassification',
    }
    auto_map = {auto: f'{module}.{name}' for auto, name in classes.items()}
    return {'model_type': 'mla_gpt', 'architectures': ['MLAGPTForCausalLM'], 'auto_map': auto_map, **sizes}


NATIVE_CLIENTS = '- It requires transformers >= 4.57.'
CODE_CLIENTS = """\
- It requires transformers >= 5.1; the tokenizer loads from 4.57 on.
- Decoding multiplies the up-projection `c_kv_up` into queries and outputs ("absorbed") only where it is a plain
  `torch.nn.Linear`. With LoRA, quantization, offloading or hooks on it, keys and values are computed from the latents
  at every step: right, but slower. Merging an adapter (`merge_and_unload()`) restores the speed.
- Continuous batching and prefix tuning, which presuppose a cache of keys and values, are refused."""


def model_card():
    """README.md of the folder, in the form that the Hugging Face hub reads: what the model is and how it was made."""
    config, keys = model.config, keys_of('train.py')
    origin = saved.get('converted_from')
    script = 'train_mla.py' if is_mla and not origin else 'train.py'
    here = ('attention', 'resume', 'overwrite', 'out_dir', 'data_dir', 'device', 'threads')  # says nothing elsewhere
    changed = {k: v for k, v in saved.get('config', {}).items() if k in keys and v != keys[k] and k not in here}
    made_with = ' '.join(f'--{key}={shlex.quote(str(value))}' for key, value in changed.items())
    loss = f', validation loss {float(saved["val_loss"]):.4f} nats per token' if saved.get('val_loss') else ''
    corpus = saved.get('corpus') or 'a corpus that it does not name'
    made = f'Trained for {saved.get("iter_num") or 0:,} iterations on {corpus}{loss}'
    if origin:
        made = f'Converted by convert_mla.py from {origin}, which was trained on {corpus}{loss}'
    trust = ', trust_remote_code=True' if code else ''
    size = f'{config.n_layer} layers, {config.n_head} heads, n_embd = {config.n_embd}, {parameters:,} parameters'
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# A GPT with {label}

{size}, up to {config.block_size:,} tokens.
Its cache takes {cache:,} bytes per token in {dtype}.

{made}.
Exported by nanoGPT-MLA's export_hf.py.

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained('{os.path.basename(os.path.normpath(out_dir))}'{trust})
```

What to know before using it with other libraries:

{CODE_CLIENTS if code else NATIVE_CLIENTS}
- Prompt and new tokens together are at most {config.block_size:,}. `generate()` stops there unless it is told a length,
  and lm_eval by `--gen_kwargs max_gen_toks=N`, where N leaves room for the prompt.

The training's settings{' before the conversion' * bool(origin)}, as a command line:

```sh
python {script} {made_with}
```

License of the weights: to be stated by whoever publishes them.{f' {MODEL_CODE} is under the MIT license.' * code}
"""


try:
    import tokenizers  # noqa: F401  (of hf_tokenizer.write)
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if format == 'gguf':
        import gguf  # noqa: F401  (of gguf_file.write)
except ImportError as error:
    raise UserError(f'exporting requires {error.name}: pip install {error.name}') from error
code = False  # whether the folder holds code
if not misfit:
    settings, tensors = form.hf_settings(model.config), form.to_hf(model.state_dict(), model.config)
elif format == 'gguf':
    raise UserError(f"a GGUF file holds a model of Llama's form here, and this one has {misfit}; use --format=hf")
elif is_mla:
    errors.notice(f'the model comes with its own code, because {form.CLASS} has no {misfit}')
    settings, tensors, code = mla_config(), model.state_dict(), True
elif problem := gpt2.misfit(model.config):
    raise UserError(
        f'no class has such a model: {form.CLASS} no {misfit}, and GPT2LMHeadModel no {problem}; sample.py reads it'
    )
else:
    if model.config.n_kv_head:
        errors.notice(f'{label} is exported as MHA, its keys and values repeated: GPT-2 shares none')
        model = to_mha(model)
    settings, tensors = gpt2.hf_settings(model.config), gpt2.to_gpt2(model.state_dict())
tokenizer = tokenizer_of(meta, model.config.vocab_size)
tied = model.lm_head.weight is model.transformer.wte.weight
tensors = {name: value.contiguous() for name, value in tensors.items() if not tied or name != 'lm_head.weight'}
dtype = str(model.lm_head.weight.dtype).removeprefix('torch.')
end_of_text = tokenizer.end_of_text if tokenizer else None
tokenizer = tokenizer if meta else None  # without a meta it's inferred from the vocabulary size, for end_of_text only
special = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'), end_of_text)
common = {**special, 'dtype': dtype, 'use_cache': True, 'tie_word_embeddings': tied}
# a pipeline would otherwise ask for 256 new tokens, whatever the model's length
generation = {**special, 'max_length': model.config.block_size}


# ---- the files -------------------------------------------------------------------------------------------------------
if not tokenizer:
    errors.notice(f'{source} has no tokenizer for text, so {out_dir} has none either')
try:
    with files.replacing_in(out_dir, GGUF_NAMES if format == 'gguf' else NAMES) as folder:
        if format == 'gguf':
            file = os.path.join(folder, *GGUF_NAMES)
            gguf_file.write(file, model.config, model.state_dict(), tokenizer and tokenizer.load(), label)
        else:
            files.write_json(os.path.join(folder, 'config.json'), {**settings, **common})
            files.write_json(os.path.join(folder, 'generation_config.json'), generation)
            weights = os.path.join(folder, 'model.safetensors')
            save_file(tensors, weights, metadata={'format': 'pt'})
            os.chmod(weights, os.stat(os.path.join(folder, 'config.json')).st_mode)  # safetensors makes it private
            if code:
                shutil.copyfile(os.path.join('core', 'convert', MODEL_CODE), os.path.join(folder, MODEL_CODE))
            with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as file:
                file.write(errors.printable(model_card()))
            if tokenizer:
                hf_tokenizer.write(folder, tokenizer, model.config.block_size)
except (OSError, SafetensorError) as error:
    way = 'free some disk space or choose another --out_dir; what was there is unchanged'
    raise UserError(f"{out_dir} can't be written ({error}); {way}") from error
errors.output(f'{out_dir}: {", ".join(sorted(os.listdir(out_dir)))}')
