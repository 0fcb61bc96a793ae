"""GGUF files of Llama's shape: written here and read back, read by transformers, and run by llama.cpp."""

import json
import urllib.request

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from support.native import BLOCK, VOCAB, byte_pairs_of_digits, foreign, logit_difference, our_llama
from transformers import LlamaForCausalLM

from core.cli.errors import UserError
from core.convert import gguf_file, hf_tokenizer
from core.runs import models
from core.text.byte_pairs import learn_bpe
from core.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer

CHARS = "\n $abcdefghijklmnopqrstuvwxyz.,;:!?\u00e9-'"
TOKENIZERS = {
    'none': None,
    'char': CharTokenizer(CHARS[:VOCAB]),
    'byte': ByteTokenizer(),
    'bpe': BPETokenizer(learn_bpe(['the thing that they think is there, and a banana is a banana'] * 3, 290)),
}


def model_for(tokenizer, **changes):
    return our_llama(vocab_size=tokenizer.n_vocab if tokenizer else VOCAB, n_head=6, n_kv_head=2, n_embd=60, **changes)


def written(file, model, tokenizer=None):
    gguf_file.write(str(file), model.config, model.state_dict(), tokenizer, 'tiny')
    return str(file)


def same_tensors(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize('name', TOKENIZERS)
def test_a_file_written_here_is_the_model_again(name, tmp_path):
    tokenizer = TOKENIZERS[name]
    model = model_for(tokenizer, tied=name == 'char')
    again, saved = models.pretrained(written(tmp_path / 'model.gguf', model, tokenizer))
    assert again.config == model.config and same_tensors(model, again)
    assert saved['tokenizer'] == (tokenizer.meta() if tokenizer else {'tokenizer': 'none', 'vocab_size': VOCAB})


def test_a_vocabulary_that_is_padded_for_the_model_keeps_its_tokenizer(tmp_path):
    tokenizer = TOKENIZERS['bpe']
    model = our_llama(vocab_size=tokenizer.n_vocab + 22)
    again, saved = models.pretrained(written(tmp_path / 'model.gguf', model, tokenizer))
    assert again.config.vocab_size == tokenizer.n_vocab + 22 and saved['tokenizer'] == tokenizer.meta()


@pytest.mark.parametrize('tied', [True, False])
def test_transformers_reads_the_file_as_our_model(tied, tmp_path):
    pytest.importorskip('accelerate')
    model = model_for(TOKENIZERS['bpe'], tied=tied, rope_theta=500.0)
    written(tmp_path / 'model.gguf', model, TOKENIZERS['bpe'])
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file='model.gguf', dtype=torch.float32).eval()
    assert logit_difference(model, theirs) < 1e-5


@pytest.mark.parametrize('kind', [None, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1,
                                  gguf.GGMLQuantizationType.BF16], ids=str)  # fmt: skip
def test_a_file_of_another_maker_gives_its_logits(kind, tmp_path):
    theirs = foreign(tmp_path / 'model.gguf', quantized=kind)
    ours, saved = models.pretrained(str(tmp_path / 'model.gguf'))
    assert ours.config.rope_theta == 10000 and saved['tokenizer']['tokenizer'] == 'none'
    assert logit_difference(ours.eval(), theirs) < 1e-5


REFUSED = {
    'scaled RoPE': (dict(keys=[('llama.rope.scaling.type', 'linear')]), 'llama.rope.scaling.type=linear; only none'),
    "Llama 3.1's RoPE": (dict(tensors=[('rope_freqs.weight', np.ones(8, np.float32))]), 'scaled RoPE .rope_freqs'),
    'experts': (dict(keys=[('llama.expert_count', 8)]), 'llama.expert_count=8; only 0'),
    'wider heads': (dict(keys=[('llama.attention.key_length', 32)]), 'llama.attention.key_length=32; only 16'),
    'a key that nobody knows': (dict(keys=[('llama.logit_scale', 2)]), 'llama.logit_scale=2, which is not supported'),
    'another architecture': (dict(arch='qwen2'), 'it holds a qwen2 model'),
    'a bias': (dict(tensors=[('blk.0.attn_q.bias', np.ones(64, np.float32))]), 'model lacks: blk.0.attn_q.bias'),
    'a missing size': (dict(without=['feed_forward_length']), 'it lacks the key llama.feed_forward_length'),
    'a part of a model': (dict(keys=[('split.count', 2)]), 'one of several parts'),
    'a name of the other form': (
        dict(tensors=[('model.norm.weight', np.ones(64, np.float32))]), 'it holds model.norm.weight twice'),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_what_a_file_needs_and_we_lack_is_refused_by_name(name, tmp_path):
    changes, message = REFUSED[name]
    foreign(tmp_path / 'model.gguf', **changes)
    with pytest.raises(UserError, match=message) as error:
        models.pretrained(str(tmp_path / 'model.gguf'))
    assert '\n' not in str(error.value)


def test_a_damaged_file_is_refused(tmp_path):
    file = tmp_path / 'model.gguf'
    foreign(file)
    whole = file.read_bytes()
    for length in (4, 100, len(whole) // 2):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="model.gguf' can't be loaded"):
            models.pretrained(str(file))


def test_byte_pairs_of_another_maker_encode_text_and_are_written_again(tmp_path):
    fast = byte_pairs_of_digits()
    theirs = foreign(tmp_path / 'model.gguf', tokenizer=fast, quantized=gguf.GGMLQuantizationType.Q4_1)
    ours, saved = models.pretrained(str(tmp_path / 'model.gguf'))
    assert logit_difference(ours.eval(), theirs) < 1e-5
    tokenizer = load_tokenizer(saved['tokenizer'])
    text = 'the 17  cats<|endoftext|>'
    assert tokenizer.encode(text, special=True) == fast.encode(text).ids != tokenizer.encode(text)
    assert (
        tokenizer.end_of_text == fast.token_to_id('<|endoftext|>') and tokenizer.decode(tokenizer.encode(text)) == text
    )
    gguf_file.write(str(tmp_path / 'again.gguf'), ours.config, ours.state_dict(), tokenizer, 'again')
    assert models.pretrained(str(tmp_path / 'again.gguf'))[1]['tokenizer'] == saved['tokenizer']


def test_byte_pairs_that_a_file_has_no_name_for_are_refused_in_one_line(tmp_path):
    fast = byte_pairs_of_digits()
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = load_tokenizer(hf_tokenizer.meta_of(json.loads(fast.to_str())))
    model = our_llama(vocab_size=tokenizer.n_vocab)
    with pytest.raises(UserError, match='use --format=hf'):
        gguf_file.write(str(tmp_path / 'model.gguf'), model.config, model.state_dict(), tokenizer, 'tiny')


@pytest.mark.parametrize('name', ['char', 'byte', 'bpe'])
def test_llama_cpp_continues_a_text_greedily_as_we_do(name, tmp_path):
    """By its server, with keys and values in float32: tokens, the text of tokens, and probabilities."""
    xllamacpp = pytest.importorskip('xllamacpp')
    tokenizer = TOKENIZERS[name]
    model = model_for(tokenizer, tied=name == 'byte', rope_theta=500.0)
    params = xllamacpp.CommonParams()
    params.model.path = written(tmp_path / 'model.gguf', model, tokenizer)
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = BLOCK, 1, -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
    server = xllamacpp.Server(params)

    def ask(path, **content):
        request = urllib.request.Request(server.listening_address + path, json.dumps(content).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    text = 'the banana'
    for line in (text, 'that  a\n\n banana ', ' \u00e9, the thing?\n'):  # more spaces than one, and more bytes
        ids = tokenizer.encode(line)
        assert ask('/tokenize', content=line, add_special=False)['tokens'] == ids
        assert ask('/detokenize', tokens=ids)['content'] == line
    prompt = tokenizer.encode(text)
    asked = dict(prompt=prompt, n_predict=20, temperature=0, ignore_eos=True, return_tokens=True, n_probs=9)
    found = ask('/completion', **asked)
    assert prompt + found['tokens'] == model.generate(torch.tensor([prompt]), 20, temperature=0)[0].tolist()
    if name == 'char':  # of others the server leaves out tokens that are parts of a character
        ids = torch.tensor([prompt + found['tokens']])
        wanted = model(ids, ids)[0][0].log_softmax(-1)[len(prompt) - 1 : -1]
        for ours, theirs in zip(wanted, found['completion_probabilities'], strict=True):
            assert all(abs(ours[each['id']] - each['logprob']) < 1e-5 for each in theirs['top_logprobs'])


def test_added_tokens_are_found_whole_again(tmp_path):
    """Special ones and others."""
    fast = byte_pairs_of_digits()
    fast.add_tokens(['<think>'])
    fast.add_special_tokens(['<turn>'])
    tokenizer = load_tokenizer(hf_tokenizer.meta_of(json.loads(fast.to_str())))
    model = our_llama(vocab_size=tokenizer.n_vocab)
    _, saved = models.pretrained(written(tmp_path / 'model.gguf', model, tokenizer))
    again, text = load_tokenizer(saved['tokenizer']), 'a<think>17<turn>'
    assert again.encode(text, special=True) == tokenizer.encode(text, special=True)
    assert tokenizer.encode('<think>')[0] >= tokenizer.n_vocab - 2
