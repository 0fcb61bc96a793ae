"""Any causal language model of transformers is measured as our own are, whatever its class calls its parts."""

import json

import numpy as np
import pytest
import torch
import transformers
from support import forking

from analysis import circuits, forward, hf_model, induction
from analysis.hf_model import HFModel
from core.cli.errors import UserError
from core.runs.models import pretrained

V = 50
SHAPE = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SHAPE |= dict(max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None)
GROUPED = SHAPE | dict(num_key_value_heads=2, head_dim=8)
LATENT = SHAPE | dict(kv_lora_rank=12, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=10)
LATENT |= dict(num_key_value_heads=4)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=16)
EXPERTS |= dict(first_k_dense_replace=1, n_group=1, topk_group=1)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)
CLASSES = {
    'gpt2': GPT2,
    'gpt_neox': SHAPE,
    'llama': GROUPED,
    'mistral': GROUPED,
    'qwen2': GROUPED,
    'qwen3': GROUPED,
    'gemma': GROUPED,
    'gemma2': GROUPED,
    'deepseek_v2': LATENT | EXPERTS,
    'deepseek_v3': LATENT | EXPERTS,
    'minicpm3': LATENT,
    'bloom': dict(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),  # its layers return tuples
}
TOKENS = torch.randint(V, (3, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def made(model_type, settings, std=0.1):
    """A model of transformers with all parameters random."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter += std * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize('model_type', CLASSES)
@torch.no_grad()
def test_the_model_shows_its_patterns_and_starts_and_ends_anywhere(model_type):
    theirs = made(model_type, CLASSES[model_type])
    wanted = theirs(TOKENS).logits
    theirs.set_attn_implementation('eager')
    attentions = theirs(TOKENS, output_attentions=True).attentions
    model = HFModel(theirs)
    assert vars(model.config) | {'block_size': 64} == dict(n_layer=2, n_head=4, n_embd=32, vocab_size=V, block_size=64)
    torch.testing.assert_close(forward.patterns(model, TOKENS), torch.stack(attentions), atol=1e-6, rtol=0)
    hidden = forward.run(model, TOKENS)
    torch.testing.assert_close(forward.logits(model, hidden.flatten(0, 1)), wanted.flatten(0, 1), atol=1e-5, rtol=1e-5)
    middle = forward.run(model, TOKENS, stop=1)
    for x, start in ((forward.run(model, TOKENS, stop=0), 0), (middle, 1)):
        torch.testing.assert_close(forward.run(model, TOKENS, x, start), hidden)
    # without its hooks it is what it was
    torch.testing.assert_close(theirs(TOKENS).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('model_type', CLASSES)
@torch.no_grad()
def test_ablating_a_head_takes_its_part_of_the_output_projection(model_type):
    model = HFModel(made(model_type, CLASSES[model_type]))

    def without(layer, z):
        return torch.cat((z[:, :2], torch.zeros_like(z[:, 2:3]), z[:, 3:]), dim=1) if layer == 1 else z

    got = forward.run(model, TOKENS, edit=without)
    assert (got - forward.run(model, TOKENS)).abs().max() > 1e-4
    model.output_weights(1)[2].zero_()  # a view of the weight
    torch.testing.assert_close(got, forward.run(model, TOKENS), atol=1e-6, rtol=1e-5)


EXPORTED = {'gpt2': GPT2, 'llama': GROUPED, 'deepseek_v3': LATENT | EXPERTS | dict(first_k_dense_replace=2)}


@pytest.mark.parametrize('model_type', EXPORTED)
def test_scores_equal_those_of_the_same_weights_in_our_own_model(model_type, tmp_path):
    theirs = made(model_type, EXPORTED[model_type], std=0.2)
    if model_type == 'gpt2':
        torch.nn.init.zeros_(theirs.transformer.h[0].attn.c_proj.bias)  # it stays in HFModel's effective embeddings
    theirs.save_pretrained(tmp_path)
    ours, model = pretrained(str(tmp_path))[0].eval(), hf_model.load(str(tmp_path), torch.float32, False)
    these = induction.repeated_sequences(6, 10, np.arange(V), seed=4)
    direct, other = (induction.head_scores(each, these) for each in (ours, model))
    for name in induction.SCORES:
        np.testing.assert_allclose(other[name], direct[name], atol=1e-6)
    np.testing.assert_allclose(other['losses'], direct['losses'], atol=2e-5)
    for got, wanted in zip(*(induction.ablate_each_head(each, these) for each in (model, ours)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
    windows = TOKENS % 12
    got, wanted = (induction.text_scores(each, windows)[0] for each in (model, ours))
    assert all(np.allclose(got[name], wanted[name], atol=1e-6) for name in wanted)
    got, wanted = (induction.ablate_on_text(each, windows, [(0, 1), (1, 2)], (2,))[0] for each in (model, ours))
    assert got['repeated']['mean'] == pytest.approx(wanted['repeated']['mean'], abs=2e-5)
    ids = np.arange(V)
    assert (circuits.copying_tokens(model, ids) == circuits.copying_tokens(ours, ids)).all()
    if model_type != 'deepseek_v3':  # whose latents' norms depend on the token, which the weights don't say
        got, wanted = (circuits.copying_eigenvalues(each, ids) for each in (model, ours))
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    if model_type == 'llama':
        got, wanted = (circuits.composition(each) for each in (model, ours))
        assert all(np.allclose(got[kind], wanted[kind], atol=1e-4, equal_nan=True) for kind in wanted)
    else:
        with pytest.raises(ValueError, match='three matrices'):
            circuits.composition(model)


def test_scores_in_bfloat16_are_those_in_float32_to_its_precision():
    model = HFModel(made('qwen3', GROUPED))
    these = induction.repeated_sequences(6, 10, np.arange(V), seed=4)
    wanted = induction.head_scores(model, these)
    got = induction.head_scores(HFModel(made('qwen3', GROUPED).bfloat16()), these)
    for name, values in got.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, wanted[name], atol=0.1 if 'loss' in name else 0.01)
    small = HFModel(made('llama', GROUPED).bfloat16())
    base, alone = induction.ablate_each_head(small, these)
    assert base.dtype == alone.dtype == np.float32 and len(np.unique(alone)) > alone.size // 2  # not on a coarse grid
    assert all(np.isfinite(lift[0, :, 1]).all() for lift in circuits.composition(small).values())


def test_initial_values_are_drawn_by_the_class_and_known_as_untrained():
    model = HFModel(made('gemma', GROUPED))
    first, again, other = (forward.untrained(model, seed) for seed in (1, 1, 2))
    assert induction.is_untrained(first) and not induction.is_untrained(model)
    weights = [fresh.model.model.layers[1].mlp.up_proj.weight for fresh in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


REFUSED = {
    't5': (dict(vocab_size=V, d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=8), 'no causal language model'),
    'bert': (SHAPE, 'later tokens'),
    'mamba': (dict(vocab_size=V, hidden_size=32, num_hidden_layers=2), 'none of its layers'),
    'qwen3_next': (GROUPED | dict(num_hidden_layers=4, num_experts=4, num_experts_per_tok=2), 'layer 0 has not'),
}


@pytest.mark.slow
@pytest.mark.parametrize('model_type', REFUSED)
def test_other_models_are_refused_in_one_line(model_type, tmp_path):
    settings, complaint = REFUSED[model_type]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    family = transformers.AutoModel if model_type == 't5' else transformers.AutoModelForCausalLM
    family.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=complaint) as refused:
        hf_model.load(str(tmp_path), torch.float32, False)
    assert '\n' not in str(refused.value)


def test_a_folder_that_lacks_a_tensor_or_needs_code_is_refused(tmp_path):
    model = made('qwen2', GROUPED)
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if 'layers.1.mlp' not in k})
    with pytest.raises(UserError, match='missing or unknown: model.layers.1.mlp'):
        hf_model.load(str(tmp_path), torch.float32, False)
    config = json.loads((tmp_path / 'config.json').read_text())
    config |= dict(model_type='theirs', auto_map={'AutoModelForCausalLM': 'code.Theirs', 'AutoConfig': 'code.Config'})
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'code.py').write_text('raise SystemExit("ran")')
    with pytest.raises(UserError, match='trust_remote_code=True'):
        hf_model.load(str(tmp_path), torch.float32, False)


@pytest.mark.slow
def test_the_script_measures_a_model_with_experts(tmp_path):
    made('deepseek_v3', LATENT | EXPERTS).save_pretrained(tmp_path / 'experts')
    quick = ('--sequences=8', '--resamples=100', '--ablate_sequences=4', '--controls=1', '--device=cpu')
    folder, out = tmp_path / 'experts', tmp_path / 'found'
    done = forking.run('find_induction_heads.py', (f'--models={folder}', f'--out_dir={out}', *quick, '--sort=sink'))
    assert done.returncode == 0, done.stderr
    assert 'deepseek_v3 of transformers' in done.stdout and 'K-lift is missing' in done.stdout
    found = json.loads((out / 'induction.json').read_text())['models'][0]
    assert np.shape(found['ablation']['rise']) == np.shape(found['sink']['mean']) == (2, 4)
    assert found['sink']['chance'] == pytest.approx(np.mean([1 / i for i in range(2, 65)]), rel=1e-4)  # 64 tokens


# ---- trained by their own classes ------------------------------------------------------------------------------------


def train(model, steps):
    """Train on blocks of random tokens of a random length that repeat, until a head attends to the repetition."""
    torch.set_grad_enabled(True)
    generator, hf = np.random.default_rng(0), HFModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    these = induction.repeated_sequences(8, 16, np.arange(64), seed=1)
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 5e-3 * min(1, (step + 1) / 100)
        period = int(generator.integers(8, 25))
        block = torch.from_numpy(generator.integers(0, 64, (32, period)))
        tokens = block.repeat(1, 48 // period + 1)[:, :48]
        logits = model.train()(tokens, use_cache=False).logits[:, period - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, period:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            model.eval()
            scores = induction.head_scores(hf, these)
            if scores['induction'].mean(0).max() > 0.5:
                return hf, these, scores
    raise AssertionError(f'no head after {steps} steps: {scores["induction"].mean(0)}')


TRAINED = dict(vocab_size=64, hidden_size=64, head_dim=16, intermediate_size=128, initializer_range=0.05)
TRAINED_LATENT = TRAINED | dict(kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)


@pytest.mark.slow
@pytest.mark.parametrize('model_type, sizes', [('llama', TRAINED), ('deepseek_v3', TRAINED_LATENT)])
def test_a_model_trained_by_its_own_class_forms_a_head_that_ablation_finds(model_type, sizes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **CLASSES[model_type] | sizes)
    model, these, scores = train(transformers.AutoModelForCausalLM.from_config(config), 600)
    strongest = divmod(int(scores['induction'].mean(0).argmax()), 4)
    assert strongest[0] == 1 and scores['previous_token'].mean(0)[0].max() > 0.3
    assert circuits.copying_eigenvalues(model, np.arange(64))[strongest] > 0.3
    base, ablated = induction.ablate_each_head(model, these)
    rise = (ablated - base).mean(-1)
    assert rise[1].argmax() == strongest[1] and rise[strongest] > 0.05
