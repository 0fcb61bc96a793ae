"""The MLA model for transformers in core/convert: the training model's logits in all ways to run it."""

import dataclasses
import inspect
import weakref

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, CompileConfig, DynamicCache, StaticCache

from core.convert.hf_modeling_mla import MLAGPTConfig, MLAGPTForCausalLM
from core.runs import models
from model_mla import MLAGPT, MLAConfig

SIZES = dict(block_size=24, vocab_size=11, n_layer=2, n_head=4, n_embd=32)
VARIANTS = {
    'learned': dict(),
    'small latent': dict(n_latent=6, bias=False, gelu='tanh'),
    'large latent': dict(n_latent=30),
    'rope': dict(pos='rope', n_latent=9, n_rope=4, n_latent_q=10, latent_norm=True),
}
variants = pytest.mark.parametrize('name', VARIANTS)
IDX = torch.randint(11, (3, 24), generator=torch.Generator().manual_seed(1))
PROMPTS = IDX[:, :9]
STARTS = (0, 4, 8)  # of the three prompts; what precedes them is padding
LEFT_PADDED = torch.stack([torch.arange(9) >= start for start in STARTS]).long()


def model_pair(name, dtype=torch.float64):
    """The training model with random weights, and the same model for transformers."""
    torch.manual_seed(0)
    ours = MLAGPT(MLAConfig(**SIZES, **VARIANTS[name])).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    sizes = {k: v for k, v in dataclasses.asdict(ours.config).items() if k not in models.NOT_THE_MODEL}
    theirs = MLAGPTForCausalLM(MLAGPTConfig(**sizes)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def largest_difference(a, b):
    return (a - b).abs().max().item()


# ---- the config ------------------------------------------------------------------------------------------------------


def test_config_has_the_fields_and_defaults_of_the_training_config():
    parameters = inspect.signature(MLAGPTConfig.__init__).parameters
    ours = {field.name: field.default for field in dataclasses.fields(MLAConfig)}
    fixed = ('n_kv_head', 'norm', 'mlp', 'n_hidden', 'shared_rope')  # others are refused by export_hf.py
    for name in (*models.NOT_THE_MODEL, *fixed, 'tied', 'init_std', 'latent_init', 'kv_rms'):
        assert ours.pop(name) is not None and name not in parameters
    assert ours == {name: parameters[name].default for name in parameters if name in ours}
    special = {'bos_token_id', 'eos_token_id', 'pad_token_id'}
    of_transformers = {'initializer_range', 'use_cache', 'tie_word_embeddings', *special}
    assert set(parameters) - set(ours) == of_transformers | {'self', 'kwargs'}


@pytest.mark.parametrize('changes', [{}, dict(pos='rope'), dict(n_embd=60, n_head=5, pos='rope', n_rope=2)], ids=str)
def test_config_resolves_zeros_as_the_training_config_does(changes):
    ours, theirs = MLAConfig(**changes), MLAGPTConfig(**changes)
    assert (ours.n_latent, ours.n_rope) == (theirs.n_latent, theirs.n_rope)


def test_a_model_from_a_bare_config_is_tied_and_generates():
    model = MLAGPTForCausalLM(MLAGPTConfig(**SIZES)).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.hidden_size == 32 and model.config.pad_token_id is None
    assert model.generate(IDX[:1, :3], max_new_tokens=4, do_sample=False).shape == (1, 7)


# ---- logits ----------------------------------------------------------------------------------------------------------


@variants
@torch.no_grad()
def test_float64_logits_and_loss_to_rounding(name):
    ours, theirs = model_pair(name)
    expected, _ = ours(IDX, IDX)
    assert largest_difference(theirs(IDX).logits, expected) < 1e-12
    _, loss = ours(IDX[:, :-1], IDX[:, 1:].contiguous())
    out = theirs(IDX, labels=IDX)
    assert out.loss.dtype == torch.float64 and largest_difference(out.loss, loss) < 1e-12
    assert largest_difference(theirs(inputs_embeds=theirs.transformer.wte(IDX)).logits, expected) < 1e-12
    assert torch.equal(theirs(IDX, logits_to_keep=2).logits, theirs(IDX).logits[:, -2:])
    assert torch.equal(theirs(IDX, return_dict=False)[0], theirs(IDX).logits)


@variants
@pytest.mark.parametrize('cache', ['dynamic', 'static'])
@torch.no_grad()
def test_float64_logits_from_a_cache_in_chunks(name, cache):
    ours, theirs = model_pair(name)
    expected, _ = ours(IDX, IDX)
    cache = DynamicCache() if cache == 'dynamic' else StaticCache(theirs.config, max_cache_len=24)
    for start, end in ((0, 7), (7, 8), (8, 10), (10, 11), (11, 23), (23, 24)):
        out = theirs(IDX[:, start:end], past_key_values=cache)
        assert largest_difference(out.logits, expected[:, start:end]) < 1e-12
    kept = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kept * 8 == 3 * 24 * ours.init_cache(1).bytes_per_token  # latents and position keys only


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@variants
@torch.no_grad()
def test_half_precision_has_softmax_and_loss_in_float32(name, dtype):
    _, exact = model_pair(name)
    _, theirs = model_pair(name, dtype)
    exact.load_state_dict(theirs.state_dict())  # with the same rounded weights
    out, reference = theirs(IDX, labels=IDX), exact(IDX, labels=IDX)
    assert out.logits.dtype == dtype and out.loss.dtype == torch.float32
    bound = 40 * torch.finfo(dtype).eps * reference.logits.std()
    assert largest_difference(out.logits, reference.logits) < bound
    cache = theirs(IDX[:, :-1]).past_key_values
    step = theirs(IDX[:, -1:], past_key_values=cache)
    assert step.logits.dtype == dtype == cache.layers[0].keys.dtype
    assert largest_difference(step.logits, reference.logits[:, -1:]) < bound


@variants
@torch.no_grad()
def test_autocast_computes_in_bfloat16_with_the_loss_in_float32(name):
    _, theirs = model_pair(name, torch.float32)
    reference = theirs(IDX, labels=IDX)
    with torch.autocast('cpu', torch.bfloat16):
        out = theirs(IDX, labels=IDX)
        step = theirs(IDX[:, -1:], past_key_values=theirs(IDX[:, :-1]).past_key_values)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    bound = 40 * torch.finfo(torch.bfloat16).eps * reference.logits.std()
    assert largest_difference(out.logits, reference.logits) < bound
    assert largest_difference(step.logits, reference.logits[:, -1:]) < bound


# ---- masks -----------------------------------------------------------------------------------------------------------


@variants
@torch.no_grad()
def test_padding_on_either_side_changes_no_logits(name):
    ours, theirs = model_pair(name)
    mask = torch.ones_like(IDX)
    mask[0, 20:], mask[1, :5] = 0, 0
    mask[2, :3], mask[2, 15:] = 0, 0
    labels = IDX.masked_fill(mask == 0, -100)
    labels[1, 5] = labels[2, 3] = -100  # what precedes the first token is padding
    for attention_mask in (mask, mask.bool()):
        out = theirs(IDX, attention_mask=attention_mask, labels=labels)
        assert out.logits.isfinite().all()
        losses = []
        for row, (start, end) in enumerate(((0, 20), (5, 24), (3, 15))):
            alone = ours(IDX[row : row + 1, start:end], IDX[row : row + 1, start:end])[0][0]
            assert largest_difference(out.logits[row, start:end], alone) < 1e-12
            losses.append(F.cross_entropy(alone[:-1], IDX[row, start + 1 : end], reduction='none'))
        assert largest_difference(out.loss, torch.cat(losses).mean()) < 1e-12


@torch.no_grad()
def test_padding_sees_no_later_token():
    """A trainer that doesn't exclude it scores the first token after the padding."""
    _, theirs = model_pair('learned')
    changed = PROMPTS.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    before, after = (theirs(idx, attention_mask=LEFT_PADDED).logits[1, :4] for idx in (PROMPTS, changed))
    assert torch.equal(before, after)


@variants
@torch.no_grad()
def test_masks_of_four_dimensions_with_rows_that_see_nothing(name):
    """What transformers passes for static caches: bool, or additive with attn_implementation='eager'."""
    ours, theirs = model_pair(name)
    visible = torch.ones(9, 9, dtype=torch.bool).tril() & LEFT_PADDED.bool()[:, None, None]
    positions = (LEFT_PADDED.cumsum(-1) - 1).clamp(min=0)
    lowest = torch.full(visible.shape, torch.finfo(torch.float64).min, dtype=torch.float64)
    for mask in (visible, lowest.masked_fill(visible, 0), lowest.masked_fill(visible, 0).masked_fill(~visible, -1e400)):
        for cache in (None, DynamicCache()):
            logits = theirs(PROMPTS, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
            for row, start in enumerate(STARTS):
                alone = ours(PROMPTS[row : row + 1, start:], PROMPTS[row : row + 1, start:])[0][0]
                assert largest_difference(logits[row, start:], alone) < 1e-12


COMPILED = CompileConfig(backend='eager', mode=None, fullgraph=True)  # generate() compiles for static caches on GPUs
COMPILED._compile_all_devices = True
WAYS = {
    'dynamic': dict(),
    'static': dict(cache_implementation='static'),
    'no cache': dict(use_cache=False),
    'beams': dict(num_beams=3),
    'beams, static': dict(num_beams=3, cache_implementation='static'),
    'beams, returned': dict(num_beams=3, num_return_sequences=2, cache_implementation='static'),
    'beams, no cache': dict(num_beams=3, num_return_sequences=2, use_cache=False),
}


@pytest.mark.parametrize('way', WAYS)
@variants
def test_left_padded_prompts_continue_as_each_does_alone(name, way):
    check_left_padded_prompts(name, WAYS[way])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['learned', 'rope'])
def test_decoding_compiles_without_graph_breaks(name):
    check_left_padded_prompts(name, dict(cache_implementation='static', compile_config=COMPILED))


@torch.no_grad()
def check_left_padded_prompts(name, options):
    ours, theirs = model_pair(name)
    beams, returned = options.get('num_beams', 1), options.get('num_return_sequences', 1)
    out = theirs.generate(PROMPTS, attention_mask=LEFT_PADDED, max_new_tokens=8, do_sample=False, output_logits=True,
                          return_dict_in_generate=True, **options)  # fmt: skip
    logits = torch.stack(out.logits, dim=1)
    assert logits.isfinite().all()
    for row, start in enumerate(STARTS):
        rows = slice(row * returned, (row + 1) * returned)
        prompt = PROMPTS[row : row + 1, start:]
        alone = theirs.generate(prompt, max_new_tokens=8, do_sample=False, num_beams=beams,
                                num_return_sequences=returned)  # fmt: skip
        assert torch.equal(out.sequences[rows, start:], alone)
        if beams == 1:
            assert torch.equal(alone, ours.generate(prompt, 8, temperature=0))
            expected = ours(alone, alone)[0][:, prompt.size(1) - 1 : -1]
            assert largest_difference(logits[rows], expected) < 1e-6  # generate() rounds them to float32


@variants
@torch.no_grad()
def test_sampled_sequences_of_one_padded_batch(name):
    """Their logits are the training model's for the drawn tokens."""
    ours, theirs = model_pair(name)
    torch.manual_seed(5)
    out = theirs.generate(PROMPTS, attention_mask=LEFT_PADDED, max_new_tokens=8, do_sample=True, num_return_sequences=2,
                          cache_implementation='static', output_logits=True, return_dict_in_generate=True)  # fmt: skip
    for row, (ids, logits) in enumerate(zip(out.sequences, torch.stack(out.logits, dim=1), strict=True)):
        alone = ids[None, STARTS[row // 2] :]
        assert largest_difference(logits, ours(alone, alone)[0][0, -9:-1]) < 1e-6


@variants
@torch.no_grad()
def test_a_returned_cache_is_continued(name):
    _, theirs = model_pair(name)
    first = theirs.generate(PROMPTS, attention_mask=LEFT_PADDED, max_new_tokens=4, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, IDX[:, :2]), dim=1)
    mask = F.pad(LEFT_PADDED, (0, 6), value=1)
    whole = theirs.generate(longer, attention_mask=mask, max_new_tokens=4)
    options = dict(attention_mask=mask, max_new_tokens=4)
    assert torch.equal(whole, theirs.generate(longer, past_key_values=first.past_key_values, **options))
    assert torch.equal(whole, theirs.generate(longer, prefill_chunk_size=4, **options))


@variants
@torch.no_grad()
def test_assisted_decoding_crops_the_cache(name):
    ours, theirs = model_pair(name)
    _, assistant = model_pair(name)
    expected = ours.generate(PROMPTS[:1], 12, temperature=0)
    for options in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=assistant)):
        assert torch.equal(expected, theirs.generate(PROMPTS[:1], max_new_tokens=12, do_sample=False, **options))


# ---- transformers' attention interface -------------------------------------------------------------------------------


@variants
def test_attention_weights_and_hidden_states_in_one_pass_and_from_the_cache(name):
    _, model = model_pair(name)
    reference = model(PROMPTS, attention_mask=LEFT_PADDED).logits
    with pytest.raises(ValueError, match='eager'):
        model(PROMPTS, output_attentions=True)
    model.set_attn_implementation('eager')
    whole = model(PROMPTS, attention_mask=LEFT_PADDED, output_attentions=True, output_hidden_states=True)
    seen = LEFT_PADDED.bool()[:, None, :, None]
    assert (whole.logits - reference)[LEFT_PADDED.bool()].abs().max() < 1e-12
    assert len(whole.attentions) == 2 and len(whole.hidden_states) == 3
    assert (model.lm_head(whole.hidden_states[-1]) - whole.logits).abs().max() < 1e-12
    cache = model(PROMPTS[:, :-1], attention_mask=LEFT_PADDED[:, :-1]).past_key_values
    last = model(PROMPTS[:, -1:], attention_mask=LEFT_PADDED, past_key_values=cache, output_attentions=True)
    for layer, weights in enumerate(whole.attentions):
        assert weights.shape == (3, 4, 9, 9) and (weights.sum(-1) - 1).abs().max() < 1e-12
        assert (weights.triu(1) * seen).abs().max() == 0
        assert (last.attentions[layer] - weights[:, :, -1:]).abs().max() < 1e-12


@torch.no_grad()
def test_layers_that_nobody_asked_for_are_not_kept():
    """A layer's attention weights are quadratic in the length."""
    _, model = model_pair('learned')
    model.set_attn_implementation('eager')
    kept, alive = [], []
    model.transformer.h[0].register_forward_hook(lambda block, x, out: kept.extend(map(weakref.ref, (x[0], out[1]))))
    model.transformer.ln_f.register_forward_hook(lambda *_: alive.append([ref() is not None for ref in kept]))
    model(IDX)
    model(IDX, output_attentions=True, output_hidden_states=True)
    assert alive[0] == [False, False] and alive[1][2:] == [True, True]


@variants
def test_a_registered_function_gets_keys_and_values_at_every_step(name):
    _, model = model_pair(name)
    wanted, calls = model.generate(PROMPTS, max_new_tokens=4, do_sample=False), []

    def watched(module, q, k, v, mask, scaling, **how):
        calls.append((module.layer, q.size(2), tuple(k.shape), tuple(v.shape)))
        causal = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2))
        mask = causal if mask is None else mask
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling).transpose(1, 2), None

    AttentionInterface.register('watched', watched)
    model.set_attn_implementation('watched')
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=4, do_sample=False), wanted)
    steps = [(9, 9), (1, 10), (1, 11), (1, 12)]
    size = model.config.n_nope + model.config.n_rope
    assert calls == [(layer, T, (3, 4, S, size), (3, 4, S, 8)) for T, S in steps for layer in range(2)]


# ---- training --------------------------------------------------------------------------------------------------------


@variants
def test_gradients_are_those_of_the_training_model(name):
    ours, theirs = model_pair(name)
    ours.train()(IDX[:, :-1], IDX[:, 1:].contiguous())[1].backward()
    theirs.train()(IDX, labels=IDX).loss.backward()
    expected = dict(ours.named_parameters())
    for parameter_name, parameter in theirs.named_parameters():
        assert largest_difference(parameter.grad, expected[parameter_name].grad) < 1e-12


def test_gradient_accumulation_divides_by_the_tokens_of_the_whole_batch():
    _, theirs = model_pair('learned')
    parts = [theirs(IDX[row : row + 1], labels=IDX[row : row + 1], num_items_in_batch=3 * 23).loss for row in range(3)]
    assert largest_difference(sum(parts), theirs(IDX, labels=IDX).loss) < 1e-12
    shifted = F.pad(IDX[:, 1:], (0, 1), value=-100)
    assert torch.equal(theirs(IDX, labels=IDX, shift_labels=shifted).loss, theirs(IDX, labels=IDX).loss)


@pytest.mark.parametrize('mask', [None, torch.ones_like(IDX).index_fill(1, torch.arange(3), 0)], ids=['full', 'padded'])
@variants
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(name, mask):
    _, theirs = model_pair(name)
    theirs.train()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    runs = []
    counts = [0]
    theirs.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
    for checkpointed in (False, True):
        if checkpointed:
            theirs.gradient_checkpointing_enable()
        theirs.zero_grad()
        counts[0] = 0
        torch.manual_seed(3)
        theirs(IDX, attention_mask=mask, labels=IDX).loss.backward()
        assert counts[0] == 1 + checkpointed
        runs.append([parameter.grad.clone() for parameter in theirs.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*runs, strict=True))
    theirs.eval()
    assert theirs(IDX).past_key_values.get_seq_length() == 24  # checkpointing is for training only


# ---- the library's other demands -------------------------------------------------------------------------------------


@torch.no_grad()
def test_resized_embeddings_stay_tied_and_keep_the_logits():
    _, theirs = model_pair('learned', torch.float32)
    before = theirs(IDX).logits
    theirs.resize_token_embeddings(15, mean_resizing=False)
    assert theirs.config.vocab_size == 15 and theirs.lm_head.weight is theirs.transformer.wte.weight
    out = theirs(IDX, labels=IDX)
    assert out.logits.shape == (3, 24, 15) and out.loss.isfinite()
    assert largest_difference(out.logits[..., :11], before) < 1e-6
    theirs.resize_token_embeddings(11)
    assert largest_difference(theirs(IDX).logits, before) < 1e-6


@torch.no_grad()
def test_saved_and_loaded_again(tmp_path):
    _, theirs = model_pair('rope', torch.float32)
    theirs.save_pretrained(tmp_path)
    again, report = MLAGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert again.config.to_diff_dict() == theirs.config.to_diff_dict()
    assert torch.equal(again(IDX).logits, theirs(IDX).logits)
    half = MLAGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half(IDX).logits, theirs.bfloat16()(IDX).logits)


def test_wrong_inputs_are_refused():
    _, theirs = model_pair('learned')
    with pytest.raises(ValueError, match='either input_ids or inputs_embeds'):
        theirs()
    with pytest.raises(ValueError, match="25 tokens don't fit; the model's block_size is 24"):
        theirs(torch.zeros(1, 25, dtype=torch.long))
    cache = theirs(IDX[:, :20]).past_key_values
    with pytest.raises(ValueError, match='attention_mask has 2 columns; it requires 22'):
        theirs(IDX[:, 20:22], past_key_values=cache, attention_mask=torch.ones(3, 2))
