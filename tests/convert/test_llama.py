"""Llama's form: transformers' models open here, and ours in transformers' class, with the same logits."""

import json
import shutil

import pytest
import torch
from support.native import IDX, check_generation, exported, logit_difference, our_llama, shaken, their_llama
from transformers import LlamaConfig, LlamaForCausalLM

from core.cli.errors import UserError
from core.convert import llama
from core.runs import models
from core.text.tokenizer import load_tokenizer
from model import GPT, GPTConfig

OURS = {
    'MHA': dict(),
    'GQA, tied': dict(n_head=6, n_kv_head=2, n_embd=60),
    'MQA, untied, another theta': dict(n_kv_head=1, tied=False, rope_theta=300.0),
    'its own hidden size': dict(n_hidden=0, n_rope=14),
}
THEIRS = {
    'GQA': dict(),
    'MHA, tied': dict(num_key_value_heads=6, tie_word_embeddings=True),
    'our eps': dict(rms_norm_eps=1e-5, num_key_value_heads=1),
    'large eps, tied': dict(rms_norm_eps=1e-2, tie_word_embeddings=True),
    'another theta': dict(rope_parameters={'rope_type': 'default', 'rope_theta': 300.0}),
}


@pytest.mark.parametrize('name', OURS)
def test_our_model_opens_in_transformers_class(name):
    ours = our_llama(**OURS[name])
    theirs = exported(ours, LlamaForCausalLM, LlamaConfig)
    assert logit_difference(ours, theirs) < 1e-5
    check_generation(ours, theirs)


@pytest.mark.parametrize('name', THEIRS)
def test_transformers_model_opens_here(name, tmp_path):
    theirs = their_llama(**THEIRS[name])
    theirs.save_pretrained(tmp_path)
    ours, saved = models.pretrained(str(tmp_path))
    assert logit_difference(ours.eval(), theirs) < 1e-5
    assert saved['tokenizer'] and saved['corpus'] == f'{tmp_path}, as published'


def test_what_opens_here_goes_back_bit_for_bit(tmp_path):
    theirs = their_llama(rms_norm_eps=1e-5)
    theirs.save_pretrained(tmp_path)
    ours, _ = models.pretrained(str(tmp_path))
    back = llama.to_hf(ours.state_dict(), ours.config)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())


def test_bfloat16_is_as_near_as_our_own():
    ours = our_llama()
    exact = ours(IDX, IDX)[0]
    theirs = exported(ours, LlamaForCausalLM, LlamaConfig, torch.bfloat16)
    own_error = (ours.bfloat16()(IDX, IDX)[0] - exact).abs().mean()
    assert (theirs(IDX).logits - exact).abs().mean() < 1.5 * own_error


def test_shards_and_half_precision_are_read(tmp_path):
    their_llama().half().save_pretrained(tmp_path, max_shard_size='20KB')
    assert len(list(tmp_path.glob('model-*.safetensors'))) > 1
    ours, _ = models.pretrained(str(tmp_path))
    assert ours.lm_head.weight.dtype == torch.float32
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert logit_difference(ours.eval(), theirs) < 1e-5


@pytest.mark.parametrize('changes', [
    dict(norm='layer'), dict(mlp='gelu'), dict(pos='none'), dict(pos='learned'), dict(bias=True), dict(n_rope=4),
], ids=str)  # fmt: skip
def test_a_setting_that_llama_lacks_is_named(changes):
    ((key, value),) = changes.items()
    config = our_llama(**changes).config
    assert llama.misfit(config) == f'{key}={value}'


def test_gpt2s_shape_is_no_llama():
    assert llama.misfit(GPTConfig()) == 'norm=layer'
    assert llama.misfit(our_llama().config) == ''


NEEDS = {
    'biases of attention': (dict(attention_bias=True), 'it has attention_bias=True; only False'),
    'biases of the MLP': (dict(mlp_bias=True), 'it has mlp_bias=True; only False'),
    'another activation': (dict(hidden_act='gelu'), 'it has hidden_act=gelu; only silu'),
    'wider heads': (dict(head_dim=12), 'it has head_dim=12; only 10'),
    'linear RoPE': (dict(rope_parameters=dict(rope_type='linear', factor=2.0, rope_theta=1e4)),
                    'scaled or partial RoPE .*rope_type=linear'),
    'partial RoPE': (dict(partial_rotary_factor=0.5), 'scaled or partial RoPE .*partial_rotary_factor=0.5'),
    'a sliding window': (dict(sliding_window=8), 'it has sliding_window=8'),
}  # fmt: skip


@pytest.mark.parametrize('name', NEEDS)
def test_what_a_config_needs_and_we_lack_is_refused_by_name(name, tmp_path):
    changes, message = NEEDS[name]
    their_llama(**changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        models.pretrained(str(tmp_path))


def saved_again(folder, change):
    """Change the tensors of a folder's file by a function of their dict."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


NORM, HEAD = 'model.layers.1.self_attn.q_norm.weight', 'lm_head.weight'
CHANGES = {
    'one too many': (lambda t: t.update({NORM: torch.ones(10)}), f'needs what our model lacks: {NORM}'),
    'one too few': (lambda t: t.pop('model.norm.weight'), 'it lacks model.norm.weight'),
    'a head that is not the embedding': (lambda t: t.update({HEAD: t['model.embed_tokens.weight'] + 1}), 'differs'),
    'another shape': (lambda t: t.update({'model.norm.weight': torch.ones(59)}), r'model.norm.weight is \(59,\)'),
    'integers': (lambda t: t.update({'model.norm.weight': torch.ones(60).to(torch.int8)}), r'quantized \(int8\)'),
    'not finite': (lambda t: t['model.norm.weight'].fill_(float('nan')), 'not finite.*: transformer.ln_f.weight'),
    'other frequencies': (lambda t: t.update({'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(5)}), 'RoPE'),
}


@pytest.mark.parametrize('name', CHANGES)
def test_every_tensor_is_used_or_refused(name, tmp_path):
    change, message = CHANGES[name]
    their_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    saved_again(tmp_path, change)
    with pytest.raises(UserError, match=message):
        models.pretrained(str(tmp_path))


def test_a_tied_head_and_frequencies_that_say_nothing_new_are_read(tmp_path):
    theirs = their_llama(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    frequencies = theirs.model.rotary_emb.inv_freq.half()

    def old_form(tensors):
        tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].clone()
        tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = frequencies

    saved_again(tmp_path, old_form)
    assert logit_difference(models.pretrained(str(tmp_path))[0].eval(), theirs) < 1e-5


@pytest.mark.parametrize('changes, message', [
    (dict(num_hidden_layers=0), 'n_layer is 0'),
    (dict(num_hidden_layers=10**9), 'n_layer is 1000000000'),
    (dict(hidden_size=61), 'not a multiple'),
    (dict(vocab_size='many'), 'vocab_size'),
    (dict(rms_norm_eps=0.0), 'rms_norm_eps is 0.0'),
    (dict(rms_norm_eps=1e-300), 'eps=1e-300 makes them so'),
], ids=str)  # fmt: skip
def test_a_config_that_makes_no_model_is_one_line(changes, message, tmp_path):
    their_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=message) as error:
        models.pretrained(str(tmp_path))
    assert '\n' not in str(error.value)


def test_a_folder_without_safetensors_or_with_a_damaged_file_is_refused(tmp_path):
    their_llama().save_pretrained(tmp_path)
    file = tmp_path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match='damaged.*copy it again'):
        models.pretrained(str(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match='no model.safetensors'):
        models.pretrained(str(tmp_path))


def test_only_how_to_compute_can_be_chosen(tmp_path):
    their_llama().save_pretrained(tmp_path)
    model, _ = models.pretrained(str(tmp_path), dropout=0.1, flash=False, recompute=True)
    assert (model.config.dropout, model.config.flash, model.config.recompute) == (0.1, False, True)
    with pytest.raises(UserError, match='block_size.*cannot be overridden'):
        models.pretrained(str(tmp_path), block_size=8)


def test_another_eps_is_exact_in_a_larger_stream():
    """In float64 the rescaled model is the one with the other eps to 1e-12."""
    config = our_llama().config
    for tied in (True, False):
        model = shaken(GPT(GPTConfig(**{**vars(config), 'tied': tied}))).double()
        for module in model.modules():
            if hasattr(module, 'eps'):
                module.eps = 1e-3
        expected = model(IDX, IDX)[0]
        rescaled = GPT(model.config).double().eval()
        rescaled.load_state_dict(llama.with_our_eps(model.state_dict(), model.config, 1e-3))
        assert (rescaled(IDX, IDX)[0] - expected).abs().max() < 1e-12
        model.load_state_dict(rescaled.state_dict())
        assert (model(IDX, IDX)[0] - expected).abs().max() > 1e-3  # eps matters here


def test_a_tokenizer_of_sentencepiece_reads_text(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    their_llama().save_pretrained(tmp_path)
    Tokenizer(kinds.Unigram([('<unk>', 0.0), ('a', -1.0), ('ab', -2.0)], 0)).save(str(tmp_path / 'tokenizer.json'))
    _, saved = models.pretrained(str(tmp_path))
    tokenizer = load_tokenizer(saved['tokenizer'])
    assert tokenizer.encode('aab') == [1, 2] and tokenizer.decode([1, 2]) == 'aab'


def test_two_sets_of_weights_in_a_folder_are_refused(tmp_path):
    their_llama().save_pretrained(tmp_path, max_shard_size='20KB')
    their_llama().save_pretrained(tmp_path / 'one')
    shutil.copy(tmp_path / 'one' / 'model.safetensors', tmp_path)
    with pytest.raises(UserError, match='has both model.safetensors and model.safetensors.index.json; remove one'):
        models.pretrained(str(tmp_path))
