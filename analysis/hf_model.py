"""
Any causal language model that transformers loads, by the same few methods that the scores need of our own models.

Nothing here knows an architecture. What differs between them is found out when a model is loaded, in one pass over a
few tokens: the layers, in each the module that returns an attention pattern, and in that the projection that is
applied last, whose input are the heads' outputs. Hooks then show the patterns and change the outputs, a layer at a
time. A layer is skipped by replacing its forward by one that returns what the next layer is to read.

Shapes: B batch, T tokens, L layers, H heads, C width, d_v size of a head's values, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.cli.errors import UserError
from ops.checks import not_finite
from ops.kernels import repeat_heads

LONGEST = 1024  # tokens in a sequence at most: a pattern of 8,192 tokens has 67 million weights, for each head


@dataclass
class Seen:
    """What a `visit` of analysis.forward sees of one layer."""

    pattern: Tensor  # (B, H, T, T)


@contextlib.contextmanager
def replaced(modules: Iterable[nn.Module], forward: Callable) -> Iterator[None]:
    """Inside, the modules' forward is another function."""
    modules = list(modules)
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own shows again


def through_norm(rows: Tensor, gain: Tensor, subtracts_mean: bool) -> Tensor:
    """Weights (..., C) on the output of a norm as they read its input, up to a positive factor per token."""
    rows = rows * gain
    return rows - rows.mean(-1, keepdim=True) if subtracts_mean else rows  # RMSNorm subtracts none


class HFModel(nn.Module):
    """A causal language model of transformers, in eval mode. ValueError unless each layer has one causal pattern."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval()
        self.model.set_attn_implementation('eager')
        self.decoder: Any = model.get_decoder()
        hf_config = model.config.get_text_config()
        count = hf_config.num_hidden_layers
        stacks = (m for m in self.decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        self.layers: Any = next(stacks, None)
        if self.layers is None:
            raise ValueError(f'it has no list of its {count} layers')
        self.attentions, self.projections, n_head = self.probe()
        example: Any = self.example
        n_embd = example[0].size(-1)
        stream: Any = self.layer_output[0] if isinstance(self.layer_output, tuple) else self.layer_output
        if stream.size(-1) != n_embd:
            raise ValueError('its layers are wider than what its output head reads')
        longest = getattr(hf_config, 'max_position_embeddings', None) or LONGEST
        sizes = dict(n_layer=count, n_head=n_head, n_embd=n_embd, vocab_size=hf_config.vocab_size)
        self.config: Any = SimpleNamespace(**sizes, block_size=min(longest, LONGEST))  # by our configs' names

    @torch.no_grad()
    def probe(self) -> tuple[list[nn.Module], list[nn.Module], int]:
        """The attention of each layer, its output projection, and H, as one pass over four tokens shows them."""
        found: list[dict] = [{} for _ in self.layers]

        def watch(seen, module, args, output):
            if 'pattern' in seen:
                return
            second = output[1] if isinstance(output, tuple) else None
            if isinstance(second, Tensor) and second.shape[2:] == (4, 4):  # attention weights (1, H, 4, 4)
                seen.update(attention=module, pattern=second)
            elif isinstance(getattr(module, 'weight', None), Tensor) and module.weight.dim() == 2:
                seen.update(projection=module, z=args[0])  # the last one before the attention returns

        handles = [
            module.register_forward_hook(lambda *call, seen=seen: watch(seen, *call))
            for layer, seen in zip(self.layers, found, strict=True)
            for module in layer.modules()
        ]
        handles.append(self.layers[0].register_forward_hook(lambda *call: setattr(self, 'layer_output', call[2])))
        try:
            self.example = self.decoder(input_ids=torch.arange(4, device=self.model.device)[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        without = [number for number, seen in enumerate(found) if 'pattern' not in seen]
        if without:
            which = 'none of its layers has' if len(without) == len(found) else f'layer {without[0]} has not'
            raise ValueError(f'{which} the pattern of a softmax attention that transformers hands out')
        heads = {seen['pattern'].size(1) for seen in found}
        if any(seen['pattern'].triu(1).any() for seen in found):
            raise ValueError('it attends to later tokens, so it is not a causal language model')
        if len(heads) > 1 or any(seen['z'].size(-1) % max(heads) for seen in found):
            raise ValueError('its layers have different numbers of heads')
        attentions, projections = ([seen[name] for seen in found] for name in ('attention', 'projection'))
        return attentions, projections, heads.pop()

    @torch.no_grad()
    def run(
        self,
        tokens: Tensor,
        x: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
        visit: Callable[[int, Any], object] | None = None,
        edit: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """What `analysis.forward.run` does, for this model."""
        stop = self.config.n_layer if stop is None else stop
        reached: list[Tensor] = []

        def after(hidden_states, *args, **kwargs):
            reached.append(hidden_states)
            return self.as_output(hidden_states)

        with contextlib.ExitStack() as changes:
            changes.enter_context(replaced(self.layers[:start], lambda *args, **kwargs: self.as_output(x)))
            changes.enter_context(replaced(self.layers[stop:], after))
            if x is not None and start == 0:
                hook = self.layers[0].register_forward_pre_hook(lambda layer, args: (x, *args[1:]))
                changes.callback(hook.remove)
            for layer in range(start, stop):
                for hook in self.hooks(layer, visit, edit):
                    changes.callback(hook.remove)
            hidden = self.decoder(input_ids=tokens, use_cache=False)[0]
        return reached[0] if reached else hidden

    def as_output(self, hidden: Tensor | None) -> Any:
        """The residual stream in the form in which this model's layers return it."""
        return (hidden, *self.layer_output[1:]) if isinstance(self.layer_output, tuple) else hidden

    def hooks(self, layer: int, visit: Callable | None, edit: Callable | None) -> Iterator[Any]:
        """Registers what shows a layer's pattern to `visit` and lets `edit` change its heads' outputs."""
        if visit is not None:

            def show(module, args, output):
                pattern = output[1]
                visit(layer, Seen(pattern.float() if pattern.element_size() < 4 else pattern))

            yield self.attentions[layer].register_forward_hook(show)
        if edit is not None:

            def change(module, args):
                z = args[0].unflatten(-1, (self.config.n_head, -1)).transpose(1, 2)
                return (edit(layer, z).transpose(1, 2).flatten(2), *args[1:])

            yield self.projections[layer].register_forward_pre_hook(change)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (n, V) of outputs of the last norm (n, C), with all that the model's class does to them."""
        as_if = replace(self.example, last_hidden_state=hidden[None])
        with replaced([self.decoder], lambda *args, **kwargs: as_if):
            return self.model(input_ids=torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)).logits[0]

    def output_weights(self, layer: int) -> Tensor:
        """Each head's part of a layer's output projection: (H, C, d_v)."""
        projection: Any = self.projections[layer]
        weight = projection.weight.T if type(projection).__name__ == 'Conv1D' else projection.weight  # GPT-2's
        return weight.unflatten(1, (self.config.n_head, -1)).transpose(0, 1)

    @torch.no_grad()
    def embeddings(self, tokens: Tensor) -> Tensor:
        """What layer 0 reads of tokens (B, T) without their positions: (B, T, C)."""
        first, second = self.run(tokens.flatten()[:1].expand(1, 2), stop=0)[0]
        if torch.equal(first, second):  # positions come in the layers, or not at all
            return self.run(tokens, stop=0)
        return self.model.get_input_embeddings()(tokens)

    @torch.no_grad()
    def norm_before(self, layer: int, reader: nn.Module | None = None) -> tuple[Tensor, bool]:
        """
        The norm through which `reader` reads the stream in `layer`: its gain (C,), and if it subtracts the mean.

        Without a reader it's the last norm, and layer n_layer.
        """
        ones = torch.ones(self.config.n_embd, device=self.model.device, dtype=self.model.dtype)
        signs = ones.clone()
        signs[1::2] = -1  # of mean 0 and mean square 1, so a norm returns its bias plus its gain times this
        x, read = torch.stack((signs, -signs, ones, -ones))[:, None], []
        hook = reader and reader.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        out = self.run(torch.zeros(4, 1, dtype=torch.int64, device=self.model.device), x, layer)
        if hook:
            hook.remove()
        up, down, of_ones, of_minus_ones = (read[0] if read else out)[:, 0]
        return (up - down) / 2 * signs, torch.allclose(of_ones, of_minus_ones)  # RMSNorm subtracts no mean

    def unembedding(self, ids: Tensor) -> Tensor:
        """The output head's rows (n, C) for some ids as they read the residual stream, through the last norm."""
        return through_norm(self.model.get_output_embeddings().weight[ids], *self.norm_before(self.config.n_layer))

    def stream_weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As of `circuits`, for one layer. ValueError where they are not three matrices and a norm before them."""
        attention: Any = self.attentions[layer]
        parts = (*self.layers[layer].children(), *attention.children())
        norms = [m for m in parts if getattr(m, 'weight', torch.empty(0, 0)).dim() == 1]
        readers: list[Any] = [getattr(attention, f'{name}_proj', None) for name in 'qkv']
        if not all(isinstance(reader, nn.Linear) for reader in readers) or len(norms) > 2:
            raise ValueError('its heads are not three matrices that read the normed residual stream')
        norm, w_o = self.norm_before(layer, readers[0]), self.output_weights(layer)
        reading = (repeat_heads(r.weight.unflatten(0, (-1, w_o.size(2))), len(w_o), dim=0) for r in readers)
        w_q, w_k, w_v = (through_norm(w, *norm) for w in reading)
        return w_q, w_k, w_v, w_o

    def get_num_params(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def fresh(self, seed: int) -> 'HFModel':
        """A model of the same shape with the initial values that its class draws."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(self.model)(copy.deepcopy(self.model.config))
        return HFModel(model.to(self.model.device, self.model.dtype))


class FolderTokenizer:
    """The tokenizer of a Hugging Face folder, by transformers, with what find_induction_heads.py needs of ours."""

    byte_pair, learned_from = True, None  # learned from other text than any data set here

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end_of_text: int | None = tokenizer.bos_token_id

    def text_ids(self) -> np.ndarray:
        """The ids that text can contain, special tokens excluded, in ascending order."""
        return np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        return self.tokenizer.decode(ids)


def tokenizer_in(folder: str, trust_remote_code: bool) -> FolderTokenizer | None:
    """The tokenizer of a Hugging Face folder; None where there is none, or none that can be loaded."""
    from transformers import AutoTokenizer

    given = dict(trust_remote_code=trust_remote_code, local_files_only=True)
    try:
        found = FolderTokenizer(AutoTokenizer.from_pretrained(folder, **given))
    except Exception:  # a damaged file raises almost anything; the model is measured with its ids then
        return None
    return found if len(found.text_ids()) else None  # without files, transformers makes up one without a vocabulary


def load(folder: str, dtype: torch.dtype | str, trust_remote_code: bool) -> HFModel:
    """
    The causal language model in a Hugging Face folder.

    trust_remote_code: run the folder's own Python code where its model needs some. UserError where no such model is
    there, where transformers would make up a tensor or drop one, and for what HFModel refuses.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    given = dict(trust_remote_code=trust_remote_code, local_files_only=True)
    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder, **given)
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not hasattr(config, 'auto_map'):
            raise ValueError(f'transformers has no causal language model of its kind, {config.model_type}')
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **given
        )
        model, report = loaded
        wrong = sorted(str(name) for kind in ('missing', 'unexpected', 'mismatched') for name in report[f'{kind}_keys'])
        if wrong:
            raise ValueError(f'its tensors are not those of {type(model).__name__}; missing or unknown: {wrong[0]}')
        if name := not_finite(model.state_dict()):
            raise ValueError(f'it holds weights that are not finite: {name}')
        return HFModel(model)
    except Exception as error:  # a folder of another kind raises almost anything
        reason = (' '.join(str(error).split()) or type(error).__name__)[:200]
        if 'trust_remote_code' in str(error):
            reason = 'it needs Python code of its own; say --trust_remote_code=True if you have read that and trust it'
        raise UserError(f"'{folder}' can't be measured: {reason}") from error
