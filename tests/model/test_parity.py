"""Our two models against other people's: Hugging Face's GPT-2, GPT-J and DeepSeek-V2/V3, and a trained minGPT."""

import base64
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.gptj.modeling_gptj import GPTJAttention

from model import GPT, CausalSelfAttention, GPTConfig, rope_table
from model_mla import MLAGPT, MLAConfig, MultiHeadLatentAttention

TOLERANCE = 1e-5


def close(a, b, tolerance=TOLERANCE):
    assert a.shape == b.shape
    assert (a - b).abs().max().item() < tolerance


def random_gpt2(**changes):
    """A GPT-2 of Hugging Face's, too small to mean anything, with weights large enough for every path to matter."""
    torch.manual_seed(0)
    settings = dict(n_layer=2, n_head=4, n_embd=32, n_positions=24, vocab_size=61, initializer_range=0.2) | changes
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    """Hugging Face's model, and the folder that it saved itself to."""
    folder = tmp_path_factory.mktemp('gpt2')
    model = random_gpt2()
    model.save_pretrained(folder)
    return model, str(folder)


def test_gpt2_logits(gpt2):
    theirs, folder = gpt2
    ours = GPT.from_pretrained(folder).eval()
    assert ours.config.gelu == 'tanh'
    idx = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(idx).logits
        logits, loss = ours(idx, idx)
        close(logits, expected)
        close(loss, torch.nn.functional.cross_entropy(expected.flatten(0, 1), idx.flatten()))
        cache = ours.init_cache(3)
        for t in range(24):
            close(ours(idx[:, t : t + 1], cache=cache)[0][:, 0], expected[:, t])


@torch.no_grad()
def test_mqa_is_gpt_bigcode():
    """Hugging Face's multi-query GPT-2: queries, then one key and one value head, in one projection as here."""
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=61)
    hf_config = transformers.GPTBigCodeConfig(n_positions=24, multi_query=True, initializer_range=0.2, **sizes)
    theirs = transformers.GPTBigCodeForCausalLM(hf_config).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours = GPT(GPTConfig(block_size=24, n_kv_head=1, gelu='tanh', **sizes)).eval()
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if '.attn.bias' not in name})
    idx = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(1))
    expected = theirs(idx).logits
    close(ours(idx, idx)[0], expected)
    cache = ours.init_cache(3)
    for t in range(24):
        close(ours(idx[:, t : t + 1], cache=cache)[0][:, 0], expected[:, t])
    assert cache.bytes_per_token == 2 * 2 * 8 * 4


def test_the_exact_gelu_is_visibly_not_gpt2(gpt2):
    """The test above can see the difference that it is there to catch."""
    theirs, folder = gpt2
    ours = GPT.from_pretrained(folder).eval()
    for block in ours.transformer.h:
        block.mlp.gelu = torch.nn.GELU()
    idx = torch.arange(24)[None]
    with torch.no_grad():
        assert (ours(idx, idx)[0] - theirs(idx).logits).abs().max() > 5 * TOLERANCE


@pytest.mark.parametrize(
    'changes, named',
    [
        (dict(layer_norm_epsilon=1e-3), 'layer_norm_epsilon'),
        (dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx'),
        (dict(activation_function='relu'), 'relu'),
    ],
)
def test_a_gpt2_that_computes_something_else_is_refused(tmp_path, changes, named):
    random_gpt2(**changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('changes', [dict(n_inner=50), dict(tie_word_embeddings=False)], ids=str)
def test_a_gpt2_with_another_hidden_size_or_a_head_of_its_own_is_read(tmp_path, changes):
    theirs = random_gpt2(**changes)
    theirs.save_pretrained(tmp_path)
    idx = torch.arange(24)[None]
    with torch.no_grad():
        close(GPT.from_pretrained(str(tmp_path)).eval()(idx, idx)[0], theirs(idx).logits)


def test_missing_tensors_are_named_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    random_gpt2().save_pretrained(tmp_path)
    state = load_file(tmp_path / 'model.safetensors')
    name = next(name for name in state if name.endswith('h.1.mlp.c_fc.weight'))
    del state[name]
    save_file(state, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match='h.1.mlp.c_fc.weight'):
        GPT.from_pretrained(str(tmp_path))


def test_pretrained_weights_of_other_families_are_refused(tmp_path):
    transformers.GPTJConfig(n_layer=1, n_head=2, n_embd=8, rotary_dim=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='gptj'):
        GPT.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match='gpt2-xl'):
        GPT.from_pretrained('gpt-2')
    with pytest.raises(ValueError, match='convert_mla.py'):
        MLAGPT.from_pretrained('gpt2')


def causal(T, S):
    """What Hugging Face adds to the scores of the last T of S positions: (1, 1, T, S)."""
    return torch.full((T, S), float('-inf')).triu(S - T + 1)[None, None]


@torch.no_grad()
def test_mha_with_rope_is_gptj():
    """GPT-J turns neighbouring pairs as we do; with its rotary_dim equal to the head size, the attention is ours."""
    torch.manual_seed(0)
    C, H, T = 32, 4, 20
    config = transformers.GPTJConfig(n_embd=C, n_head=H, rotary_dim=C // H, n_positions=T, attn_implementation='eager')
    theirs = GPTJAttention(config, layer_idx=0).eval()
    ours = CausalSelfAttention(GPTConfig(n_embd=C, n_head=H, block_size=T, bias=False, pos='rope'), 0).eval()
    ours.c_attn.weight.copy_(torch.cat([p.weight for p in (theirs.q_proj, theirs.k_proj, theirs.v_proj)]).mul_(4))
    for projection in (theirs.q_proj, theirs.k_proj, theirs.v_proj):
        projection.weight.mul_(4)  # sharper patterns than a fresh layer has
    ours.c_proj.weight.copy_(theirs.out_proj.weight)
    x, positions = torch.randn(2, T, C), torch.arange(T)[None].expand(2, -1)
    expected = theirs(x, attention_mask=causal(T, T), position_ids=positions)[0]
    close(ours(x, rope_table(C // H, T)), expected)


def deepseek(module, query_rank, bias):
    """Hugging Face's attention and rotary embedding, and ours with the same random weights, copied by name."""
    torch.manual_seed(0)
    version = 'V2' if module is deepseek_v2 else 'V3'
    H, C, nope, turned, value, rank = 4, 32, 6, 4, 5, 12
    config = getattr(transformers, f'Deepseek{version}Config')(
        hidden_size=C,
        num_attention_heads=H,
        num_key_value_heads=H,
        kv_lora_rank=rank,
        q_lora_rank=query_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=turned,
        v_head_dim=value,
        attention_bias=bias,
        max_position_embeddings=64,
        attn_implementation='eager',
    )
    theirs = getattr(module, f'Deepseek{version}Attention')(config, layer_idx=0).eval()
    rotary = getattr(module, f'Deepseek{version}RotaryEmbedding')(config)
    ours = MultiHeadLatentAttention(
        MLAConfig(
            n_embd=C,
            n_head=H,
            n_latent=rank,
            n_latent_q=query_rank or 0,
            n_nope=nope,
            n_rope=turned,
            n_value=value,
            pos='rope',
            latent_norm=True,
            bias=bias,
            block_size=64,
        ),
        layer=0,
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if 'layernorm' in name else 0.0, 0.4)
        copy_deepseek(theirs, ours, H, nope, value)
    return theirs, rotary, ours


def copy_deepseek(theirs, ours, H, nope, value):
    pairs = [('c_kv_down', 'kv_a_proj_with_mqa'), ('kv_norm', 'kv_a_layernorm'), ('c_proj', 'o_proj')]
    if theirs.q_lora_rank:
        pairs += [('c_q_down', 'q_a_proj'), ('q_norm', 'q_a_layernorm'), ('c_q', 'q_b_proj')]
    else:
        pairs += [('c_q', 'q_proj')]
    state = {}
    for mine, other in pairs:
        for name, parameter in getattr(theirs, other).named_parameters():
            state[f'{mine}.{name}'] = parameter
    # theirs holds the keys and values of a head together, ours all keys, then all values
    up = theirs.kv_b_proj.weight.view(H, nope + value, -1)
    state['c_kv_up.weight'] = torch.cat((up[:, :nope].flatten(0, 1), up[:, nope:].flatten(0, 1)))
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    for name in missing:  # the biases that theirs never has
        assert name in ('c_q.bias', 'c_kv_up.bias')
        ours.get_parameter(name).zero_()


@torch.no_grad()
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('query_rank', [None, 10])
@pytest.mark.parametrize('module', [deepseek_v2, deepseek_v3], ids=['V2', 'V3'])
def test_mla_is_deepseeks(module, query_rank, bias):
    theirs, rotary, ours = deepseek(module, query_rank, bias)
    B, T = 2, 40
    x, positions, rope = torch.randn(B, T, 32), torch.arange(T)[None], rope_table(4, 64)
    expected = theirs(x, position_embeddings=rotary(x, positions), attention_mask=causal(T, T))[0]
    close(ours(x, rope[:, :T]), expected)
    assert not torch.allclose(expected[0], expected[1], atol=0.1)  # two sequences, two answers

    for absorb in (True, False):
        ours.absorbing_pays = lambda T, absorb=absorb: absorb
        their_cache = transformers.DynamicCache()
        cache = GPT.init_cache(CacheOwner(ours), B)
        start = 0
        for chunk in [7, 1, 1, 5, 1, 20, 1, 1, 1, 1, 1]:
            end = start + chunk
            part = x[:, start:end]
            embedded = rotary(part, positions[:, start:end])
            reply = theirs(
                part,
                position_embeddings=embedded,
                attention_mask=causal(chunk, end),
                past_key_values=their_cache,
            )[0]
            mine = ours(part, rope[:, start:end], cache)
            cache.length = start = end
            close(mine, reply)
            close(mine, expected[:, end - chunk : end])
        assert end == T


class CacheOwner:
    """As much of a model as `GPT.init_cache` looks at: one layer of `attention`."""

    def __init__(self, attention):
        self.attention = attention
        self.transformer = SimpleNamespace(wte=attention.c_proj, h=[SimpleNamespace(attn=attention)])
        sizes = dict(n_layer=1, n_embd=32, n_head=4, block_size=64, pos='rope')
        self.config = MLAConfig(**sizes, n_latent=attention.n_latent, n_rope=attention.n_rope)


def decoded(path):
    """The tensors of a JSON file of llm-viz: {name: float32 tensor}, and its config."""
    entries = json.loads(path.read_text())
    config = entries.pop('config')
    tensors = {
        name: torch.from_numpy(np.frombuffer(base64.b64decode(entry['data']), '<f4').copy()).view(entry['shape'])
        for name, entry in entries.items()
    }
    return config, tensors


@pytest.fixture(scope='module')
def sorter(shared_data):
    """minGPT's sorter of six digits 0 to 2, in our blocks. Its head is not tied to its embeddings."""
    config, state = decoded(shared_data / 'gpt_nano_sort' / 'gpt-nano-sort-model.json')
    sizes = {name: config[name] for name in ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'block_size')}
    model = GPT(GPTConfig(**sizes, gelu='tanh')).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    model.load_state_dict({name: value for name, value in state.items() if not name.endswith('.attn.bias')})
    return model


@torch.no_grad()
def test_mingpt_activations(sorter, shared_data):
    _, expected = decoded(shared_data / 'gpt_nano_sort' / 'gpt-nano-sort-t0-partials.json')
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.__setitem__(name, output)

    block = sorter.transformer.h[0]
    watched = {'tok_emb': sorter.transformer.wte, 'x': sorter.transformer.drop, 'ln_f': sorter.transformer.ln_f}
    watched |= {'ln1': block.ln_1, 'qkv': block.attn.c_attn, 'yProj': block.attn, 'ln2': block.ln_2}
    watched |= {'fc': block.mlp.c_fc, 'gelu': block.mlp.gelu, 'mlp': block.mlp}
    watched |= {f'block{i}': block for i, block in enumerate(sorter.transformer.h)}
    hooks = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    idx = expected['idx'].long()
    logits, _ = sorter(idx, idx)
    for hook in hooks:
        hook.remove()
    seen |= {'lm_head': logits, 'probs': logits.softmax(dim=-1), 'pos_emb': sorter.transformer.wpe.weight[None]}
    seen |= dict(zip('qkv', block.attn.qkv(seen['ln1']), strict=True))
    for name, value in seen.items():
        close(value, expected[name])
    assert len(seen) == len(watched) + 6


@torch.no_grad()
@pytest.mark.slow
def test_mingpt_sorts_2000_of_2000(sorter):
    digits = torch.randint(3, (2000, 6), generator=torch.Generator().manual_seed(0))
    for use_cache in (True, False):
        out = sorter.generate(digits, 6, temperature=0, use_cache=use_cache)
        assert (out[:, 6:] == digits.sort(dim=1).values).all(dim=1).sum() == 2000
