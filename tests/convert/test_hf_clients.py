"""The exported MLA model as other libraries use it: adapters, quantization, offloading, packing, backbones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from core.convert import hf_modeling_mla
from core.convert.hf_modeling_mla import (
    CACHE,
    Attention,
    MLAGPTConfig,
    MLAGPTForCausalLM,
    MLAGPTForSequenceClassification,
    MLAGPTModel,
)

SIZES = dict(block_size=24, vocab_size=11, n_layer=2, n_head=4, n_embd=32)
VARIANTS = {
    'learned': dict(n_latent=12),
    'rope': dict(pos='rope', n_latent=9, n_rope=4, n_latent_q=10, latent_norm=True),
    'published': dict(pos='rope', n_latent=12, n_nope=6, n_rope=4, n_value=5),
}
variants = pytest.mark.parametrize('name', VARIANTS)
IDX = torch.randint(11, (3, 24), generator=torch.Generator().manual_seed(1))


def randomized(model, dtype=torch.float64):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def random_model(name, dtype=torch.float64):
    return randomized(MLAGPTForCausalLM(MLAGPTConfig(**SIZES, **VARIANTS[name])), dtype)


@torch.no_grad()
def decoded(model, start=9):
    """The logits of IDX from `start` on, token by token from a cache."""
    cache = model(input_ids=IDX[:, :start], use_cache=True)[CACHE]
    steps = [model(input_ids=IDX[:, t : t + 1], **{CACHE: cache}).logits for t in range(start, IDX.size(1))]
    return torch.cat(steps, dim=1)


def largest_difference(a, b):
    return (a - b).abs().max().item()


# ---- what replaces or wraps the up-projection ------------------------------------------------------------------------


class Adapted(nn.Module):
    """As PEFT's LoRA layer: `weight` is the frozen one, and the product has a part that is not in it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.more(x)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


def adapted(attention):
    attention.c_kv_up = Adapted(attention.c_kv_up)


def subclassed(attention):
    attention.c_kv_up.__class__ = Halved


def replaced(attention):
    """As accelerate's offloading: the weight is away until the layer's own `forward` fetches it."""
    up = attention.c_kv_up
    kept = {name: value.detach().clone() * 1.5 for name, value in up.named_parameters()}
    up.to('meta').forward = lambda x: F.linear(x, kept['weight'], kept['bias'])


def parametrized(attention):
    nn.utils.parametrize.register_parametrization(attention.c_kv_up, 'weight', Scaled())


WRAPPINGS = {
    'adapter': adapted,
    'subclass': subclassed,
    'offloaded': replaced,
    'parametrized': parametrized,
    'hook': lambda attention: attention.c_kv_up.register_forward_hook(lambda module, inputs, out: 1.5 * out),
    'pre-hook': lambda attention: attention.c_kv_up.register_forward_pre_hook(lambda module, inputs: 1.5 * inputs[0]),
}


@pytest.mark.parametrize('wrapping', WRAPPINGS)
@variants
@torch.no_grad()
def test_decoding_calls_an_up_projection_that_is_not_a_plain_linear_layer(name, wrapping):
    model = random_model(name)
    before = model(IDX).logits
    for block in model.transformer.h:
        WRAPPINGS[wrapping](block.attn)
    randomized(model)
    whole = model(IDX).logits
    assert largest_difference(whole, before) > 0.01
    assert largest_difference(decoded(model), whole[:, 9:]) < 1e-12


def test_decoding_with_a_plain_layer_computes_no_keys(monkeypatch):
    model, calls = random_model('learned'), []
    kept = Attention.absorbed
    monkeypatch.setattr(Attention, 'absorbed', lambda self, *args: calls.append(self.layer) or kept(self, *args))
    decoded(model, start=22)
    assert calls == [0, 1] * 2
    model.transformer.h[1].attn.c_kv_up.register_forward_hook(lambda *_: None)
    calls.clear()
    decoded(model, start=22)
    assert calls == [0] * 2


@pytest.mark.parametrize('dora', [False, True], ids=['lora', 'dora'])
@variants
@torch.no_grad()
def test_adapters_of_peft_act_while_decoding(name, dora):
    """peft 0.21.2."""
    peft = pytest.importorskip('peft')
    model = random_model(name, torch.float32)
    before = model(IDX).logits
    settings = dict(target_modules='all-linear', use_dora=dora, init_lora_weights=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings, task_type='CAUSAL_LM')).eval()
    whole = adapted(input_ids=IDX).logits
    assert largest_difference(whole, before) > 0.1
    assert largest_difference(decoded(adapted), whole[:, 9:]) < 1e-4
    assert largest_difference(decoded(adapted.merge_and_unload()), whole[:, 9:]) < 1e-4


@variants
@torch.no_grad()
def test_offloaded_models_decode(name):
    """accelerate 1.15.0."""
    accelerate = pytest.importorskip('accelerate')
    model = random_model(name)
    expected = model(IDX).logits
    accelerate.cpu_offload(model, execution_device='cpu')
    assert model.transformer.h[0].attn.c_kv_up.weight.is_meta
    assert largest_difference(decoded(model), expected[:, 9:]) < 1e-12


@variants
@torch.no_grad()
def test_weights_that_torchao_quantized_decode(name):
    """torchao 0.18.0."""
    quantization = pytest.importorskip('torchao.quantization')
    model = random_model(name, torch.float32)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.transformer.h[0].attn.c_kv_up.weight) is not nn.Parameter
    assert largest_difference(decoded(model), model(IDX).logits[:, 9:]) < 1e-4


# ---- the sizes of DeepSeek's heads -----------------------------------------------------------------------------------


@torch.no_grad()
def test_heads_with_sizes_of_their_own_attend_by_the_formula(tmp_path):
    """Six dimensions for content, four rotated beside them, values of five: written out head by head."""
    model = random_model('published')
    attention = model.transformer.h[0].attn
    assert attention.c_q.out_features == 4 * 10 and attention.c_kv_up.out_features == 4 * (6 + 5)
    assert attention.c_proj.in_features == 4 * 5
    x, T = torch.randn(1, 7, 32, dtype=torch.float64), 7
    rope = hf_modeling_mla.rope_angles(torch.arange(T)[None], 4, 10000.0)
    out, _ = attention(x, rope, None, T, None)
    q = attention.c_q(x)[0].view(T, 4, 10)
    latent, k_rope = attention.c_kv_down(x)[0].split((12, 4), dim=-1)
    up = attention.c_kv_up(latent)
    k_rope = hf_modeling_mla.rotate(k_rope[None, None], rope)[0, 0]
    heads = []
    for h in range(4):
        q_rope = hf_modeling_mla.rotate(q[None, None, :, h, 6:], rope)[0, 0]
        scores = q[:, h, :6] @ up[:, 6 * h : 6 * h + 6].t() + q_rope @ k_rope.t()
        weights = (scores / 10**0.5).masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf).softmax(-1)
        heads.append(weights @ up[:, 24 + 5 * h : 24 + 5 * h + 5])
    assert largest_difference(out[0], attention.c_proj(torch.cat(heads, dim=-1))) < 1e-12
    assert largest_difference(decoded(model), model(IDX).logits[:, 9:]) < 1e-12
    model.float().save_pretrained(tmp_path)
    again = MLAGPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDX).logits, model(IDX).logits)


def test_a_config_of_an_older_export_has_heads_of_one_size():
    config = MLAGPTConfig(**SIZES, pos='rope', n_rope=2)
    assert (config.n_nope, config.n_rope, config.n_value) == (6, 2, 8)


# ---- packed documents ------------------------------------------------------------------------------------------------

STARTS = (0, 9, 13)
POSITIONS = torch.cat([torch.arange(9), torch.arange(4), torch.arange(11)])[None]


def documents_alone(model):
    parts = zip(STARTS, (*STARTS[1:], 24), strict=True)
    return torch.cat([model(IDX[:, start:end]).logits for start, end in parts], dim=1)


@variants
def test_documents_packed_into_a_row_do_not_see_each_other(name):
    model = random_model(name)
    with torch.no_grad():
        expected = documents_alone(model)
        for positions in (POSITIONS, POSITIONS.expand(3, -1)):
            for cached in (True, False):
                got = model(IDX, position_ids=positions, use_cache=cached).logits
                assert largest_difference(got, expected) < 1e-12
        model.set_attn_implementation('eager')
        assert largest_difference(model(IDX, position_ids=POSITIONS).logits, expected) < 1e-12
    model.train()
    logits = model(IDX, position_ids=POSITIONS).logits
    gradient = torch.autograd.grad(logits[:, 9].sum(), model.transformer.h[0].attn.c_kv_up.weight)[0]
    alone = torch.autograd.grad(model(IDX[:, 9:10]).logits.sum(), model.transformer.h[0].attn.c_kv_up.weight)[0]
    assert largest_difference(logits, expected) < 1e-12 and largest_difference(gradient, alone) < 1e-12


@torch.no_grad()
def test_a_row_of_packed_documents_may_be_longer_than_one():
    """As trl packs a whole batch into one row; each document must fit."""
    model = random_model('learned')
    row, positions = IDX.reshape(1, 72), torch.arange(24).repeat(3)[None]
    assert largest_difference(model(row, position_ids=positions).logits.view(3, 24, 11), model(IDX).logits) < 1e-12
    positions[0, 24:] = torch.arange(48)
    with pytest.raises(ValueError, match="48 tokens don't fit; the model's block_size is 24"):
        model(row, position_ids=positions)


@torch.no_grad()
def test_gpt2_of_transformers_separates_the_same_documents():
    """Where no cache is asked for; with one, transformers 5.23 lets them see each other."""
    model = GPT2LMHeadModel(GPT2Config(n_positions=24, vocab_size=11, n_layer=2, n_head=4, n_embd=32)).double().eval()
    packed = model(IDX, position_ids=POSITIONS, use_cache=False).logits
    assert largest_difference(packed, documents_alone(model)) < 1e-12


# ---- backbones, outputs, caches --------------------------------------------------------------------------------------


@variants
@torch.no_grad()
def test_the_backbone_gives_what_the_head_reads(name):
    model = random_model(name)
    assert type(model.base_model) is MLAGPTModel is type(model.get_decoder())
    hidden = model.base_model(IDX).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(IDX).logits)
    assert model.base_model.get_input_embeddings() is model.get_input_embeddings() is model.transformer.wte


@variants
def test_a_classifier_reads_each_last_token_that_is_not_padding(name):
    config = MLAGPTConfig(**SIZES, **VARIANTS[name], pad_token_id=0, num_labels=3)
    model = randomized(MLAGPTForSequenceClassification(config))
    idx, ends = IDX.clamp(min=1), (23, 10, 0)
    for row, end in enumerate(ends):
        idx[row, end + 1 :] = 0
    out = model(idx, attention_mask=(idx != 0).long(), labels=torch.tensor([0, 2, 1]))
    hidden = model.transformer(idx, attention_mask=(idx != 0).long()).last_hidden_state
    expected = model.score(torch.stack([hidden[row, end] for row, end in enumerate(ends)]))
    assert out.logits.shape == (3, 3) and largest_difference(out.logits, expected) < 1e-12
    assert largest_difference(out.loss, F.cross_entropy(expected, torch.tensor([0, 2, 1]))) < 1e-6
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_return_dict_none_is_what_the_config_says():
    model = random_model('learned')
    assert model(IDX, return_dict=None).logits.shape == (3, 24, 11)
    model.config.return_dict = False
    assert isinstance(model(IDX), tuple) and isinstance(model(IDX, return_dict=None), tuple)
    assert model(IDX, return_dict=True).logits.shape == (3, 24, 11)


@torch.no_grad()
def test_the_cache_has_two_names():
    """transformers 5.24 passes it as `cache`; a model that overlooked it would continue the last token alone."""
    model = random_model('learned')
    expected = model(IDX).logits[:, 10:]
    for name in ('past_key_values', 'cache'):
        cache = model(IDX[:, :10])[CACHE]
        assert largest_difference(model(IDX[:, 10:], **{name: cache}).logits, expected) < 1e-12
        hidden = model.transformer(IDX[:, 10:], **{name: model(IDX[:, :10])[CACHE]}).last_hidden_state
        assert largest_difference(model.lm_head(hidden), expected) < 1e-12


def test_a_cache_is_not_kept_where_blocks_are_computed_again():
    model = random_model('learned').train()
    plain = torch.autograd.grad(model(IDX, labels=IDX).loss, list(model.parameters()))
    model.gradient_checkpointing_enable()
    out = model(IDX, labels=IDX, use_cache=True)
    again = torch.autograd.grad(out.loss, list(model.parameters()))
    assert getattr(out, CACHE) is None
    assert all(largest_difference(a, b) < 1e-12 for a, b in zip(plain, again, strict=True))


def test_continuous_batching_and_prefix_tuning_are_refused():
    model = random_model('learned')
    assert not hasattr(model, 'init_continuous_batching')  # `transformers serve` asks, and does without it
    with pytest.raises(NotImplementedError, match='a cache of latents has no continuous batching'):
        model.generate_batch([[1, 2]])
    prefix = DynamicCache()
    for layer in range(2):
        prefix.update(*torch.zeros(2, 3, 4, 5, 8, dtype=torch.float64), layer)
    with pytest.raises(ValueError, match='4 heads with 8 dimensions.* one latent of 12; prefix tuning is not possible'):
        model(IDX[:, :4], attention_mask=torch.ones(3, 9), **{CACHE: prefix})


def test_a_copy_of_the_model_is_a_model_of_its_own():
    """What DPO does to get its reference model."""
    model = random_model('learned')
    again = copy.deepcopy(model)
    assert again.lm_head.weight is again.transformer.wte.weight is not model.lm_head.weight
    assert torch.equal(again(IDX).logits, model(IDX).logits)
