"""
Breaks the code in one line at a time, and asks whether the tests notice.

$ python tests/mutations.py             # all of MUTATIONS: tests/README.md's table on stdout
$ python tests/mutations.py 3 17        # those alone

Each mutation is made in a copy of what is committed, where only the tests named for it run, until one fails.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# what it breaks, file, line as it is, line as it becomes, test files that should notice
MUTATIONS = [
    ('scores scaled by the width, not the head size', 'model.py', 'self.scale = 1 / math.sqrt(self.head_size)',
     'self.scale = 1 / math.sqrt(self.n_embd)', 'parity'),
    ('attention reads the stream before its norm', 'model.py', 'x = x + self.attn(self.ln_1(x), rope, cache)',
     'x = x + self.attn(x, rope, cache)', 'parity'),
    ('residual projections start as large as others', 'model.py',
     "return std / math.sqrt(2 * self.config.n_layer) if name.endswith('c_proj.weight') else std", 'return std',
     'model'),
    ('masked targets are scored', 'model.py',
     'return scores, F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-1)',
     'return scores, F.cross_entropy(scores.flatten(0, 1), targets.flatten().clamp(min=0))', 'model'),
    ('RoPE reflects instead of rotating', 'model.py',
     'return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)',
     'return torch.stack((even * cos + odd * sin, even * sin - odd * cos), dim=-1).flatten(-2).to(x.dtype)', 'parity'),
    ('a chunk counts as one token in the cache', 'ops/cache.py', 'self.length += T', 'self.length += 1', 'cache'),
    ('samples of one prompt forget its length', 'ops/cache.py',
     'copy.length = self.length', 'pass',
     'decoding'),
    ('a full cache is refilled with a quarter', 'ops/decoding.py',
     'self.logits = self.run(self.tokens[:, self.length - max(1, self.cache.max_tokens // 2) : self.length])',
     'self.logits = self.run(self.tokens[:, self.length - max(1, self.cache.max_tokens // 4) : self.length])',
     'decoding'),
    ('norm gains decay too', 'ops/optimizers.py',
     'dict(params=[(n, p) for n, p in named if p.dim() < 2], weight_decay=0.0),',
     'dict(params=[(n, p) for n, p in named if p.dim() < 2], weight_decay=weight_decay),', 'optimizers'),
    ('Muon takes the embeddings too', 'ops/optimizers.py', "return '.h.' in name and parameter.dim() == 2",
     'return parameter.dim() == 2', 'optimizers'),
    ('a resumed Muon starts with new momentum', 'ops/optimizers.py',
     "if 'momentum_buffer' not in state:", 'if True:', 'optimizers'),
    ('attention counts half its FLOPs', 'model.py',
     'return 6 * matrices + 6 * config.n_layer * config.n_head * sum(config.widths) * config.block_size',
     'return 6 * matrices + 3 * config.n_layer * config.n_head * sum(config.widths) * config.block_size', 'model'),
    ('GPT-2 is loaded with the exact GELU', 'core/convert/gpt2.py',
     "GELUS = {'tanh': ('gelu_new', 'gelu_pytorch_tanh'), 'exact': ('gelu',)}",
     "GELUS = {'exact': ('gelu_new', 'gelu_pytorch_tanh'), 'tanh': ('gelu',)}", 'parity'),
    ('MLA scales by its latent', 'model_mla.py',
     'self.scale = 1 / math.sqrt(self.n_nope + self.n_rope)  # of the whole query, its position part included',
     'self.scale = 1 / math.sqrt(self.n_latent)', 'parity'),
    ('absorbed attention forgets the values\' bias', 'model_mla.py', 'y = y if b_v is None else y + b_v[:, None]',
     'pass', 'cache'),
    ('the latent is cached without its norm', 'model_mla.py',
     'return torch.cat((self.kv_norm(c_kv), k_rope), dim=-1)', 'return torch.cat((c_kv, k_rope), dim=-1)', 'parity'),
    ('the cost rule is turned around', 'model_mla.py',
     'return self.shared_rope and T * (2 * self.n_latent - both) < self.n_latent * both',
     'return self.shared_rope and T * (2 * self.n_latent - both) >= self.n_latent * both', 'cache'),
    ('MLA starts with MHA\'s 0.02 everywhere', 'model_mla.py', "if config.latent_init == 'fan_in':", 'if False:',
     'model'),
    ('the up-projection starts at its own fan-in', 'model_mla.py',
     'return 0.5 / math.sqrt(rank) if rank else super().init_std(name)',
     'return 1 / math.sqrt(rank) if rank else super().init_std(name)', 'model'),
    ('compressed queries skip their norm', 'model_mla.py',
     'c_q = self.q_norm(self.c_q_down(x)) if self.n_latent_q else x  # eq. 12',
     'c_q = self.c_q_down(x) if self.n_latent_q else x', 'parity'),
    ('the written-out gradient of queries lacks the scale', 'ops/kernels.py',
     'grad_q[:, rows] = torch.bmm(grad_scores, k[:, seen]).mul_(ctx.scale)',
     'grad_q[:, rows] = torch.bmm(grad_scores, k[:, seen])', 'kernels'),
    ('dropout does not scale up what it keeps', 'ops/kernels.py',
     'return x * kept.to(x.dtype).mul_(65536 / (65536 - dropped))', 'return x * kept.to(x.dtype)', 'kernels'),
    ('the fused loss divides by all rows', 'ops/kernels.py', 'return total / count', 'return total / x.size(0)',
     'kernels'),
    ('the mask of a chunk is aligned top-left', 'ops/kernels.py',
     'return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)',
     'return torch.ones(T, S, dtype=torch.bool, device=device).tril(0)', 'kernels cache'),
    ('top_p keeps too little', 'ops/decoding.py',
     'beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # the more likely ids alone already reach p',
     'beyond = ordered.cumsum(dim=-1) >= top_p', 'decoding sample'),
    ('a fixed step does not see its own token', 'ops/cache.py',
     'seen = torch.arange(self.max_tokens, device=self.position.device)[None] <= self.position',
     'seen = torch.arange(self.max_tokens, device=self.position.device)[None] < self.position', 'decoding'),
    ('padded ids are drawn', 'ops/decoding.py', 'logits = logits[:, :valid_ids]', 'pass', 'decoding sample'),
    ('gradients are clipped before they are unscaled', 'train.py',
     'scaler.unscale_(optim)', 'pass', 'train_numerics'),
    ('every rank drops the same', 'train.py',
     'seed_dropout(seed, iter_num, micro_step, processes.rank)',
     'seed_dropout(seed, iter_num, micro_step, 0)', 'train_numerics processes'),
    ('the gradient is not clipped', 'train.py',
     'grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)',
     'grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), math.inf)', 'train train_numerics'),
    ('micro-batches add up instead of averaging', 'train.py',
     'micro_loss = model(x, y, logits=False)[1] / micro_steps', 'micro_loss = model(x, y, logits=False)[1]',
     'train_numerics processes'),
    ('the learning rate never changes', 'train.py', "group['lr'] = lr * group.get('lr_scale', 1.0)",
     "group['lr'] = learning_rate * group.get('lr_scale', 1.0)", 'train'),
    ('all ranks read the same rows', 'train.py',
     'first = (micro_step * processes.world_size + processes.rank) * batch_size',
     'first = micro_step * processes.world_size * batch_size', 'processes'),
    ('a loss that is not finite is not noticed', 'train.py',
     'finite = loss.isfinite() & (grad_norm.isfinite() | scaler.is_enabled())',
     'finite = torch.ones_like(loss, dtype=torch.bool)', 'resume train'),
    ('gradients accumulate over iterations', 'train.py', 'optim.zero_grad(set_to_none=True)', 'pass', 'train'),
    ('all batches are batch 0', 'core/text/dataset.py', 'key = np.array([seed % 2**64, n % 2**64], dtype=np.uint64)',
     'key = np.array([seed % 2**64, 0], dtype=np.uint64)', 'dataset train'),
    ('targets are the inputs', 'core/text/dataset.py',
     'x, y = window[:, :-1].astype(np.int64), window[:, 1:].astype(np.int64)',
     'x, y = window[:, :-1].astype(np.int64), window[:, :-1].astype(np.int64)', 'dataset'),
    ('evaluation takes the first windows', 'core/text/dataset.py',
     'return np.arange(count, dtype=np.int64) * slots // count * step',
     'return np.arange(count, dtype=np.int64) * step', 'dataset'),
    ('loading a checkpoint may run code', 'core/runs/checkpoint.py',
     'checkpoint = torch.load(file, map_location=device, weights_only=True, mmap=mapped)',
     'checkpoint = torch.load(file, map_location=device, weights_only=False, mmap=mapped)', 'checkpoint'),
    ('a resumed optimizer keeps its old weight decay', 'core/runs/resume.py',
     "made = optimizer.state_dict()['param_groups']", 'made = then', 'resume'),
    ('damaged checkpoints are loaded', 'core/runs/checkpoint.py', 'check_sums(file)', 'pass', 'folder'),
    ('files are written in place', 'core/cli/files.py', "temporary = f'{path}.writing'", 'temporary = path',
     'checkpoint files'),
    ('a resumed run may read other data', 'core/runs/resume.py', "check_data(saved.get('tokenizer'), data, source)",
     'pass', 'resume'),
    ('resuming ignores what the run was made with', 'core/runs/resume.py',
     'keys = {**keys, **{key: then[key] for key in ours - given if same_type(then.get(key), keys[key])}}',
     'keys = dict(keys)', 'resume'),
    ('two trainers share a folder', 'core/cli/locks.py', 'fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)', 'pass',
     'folder'),
    ('a converted bias forgets the mean', 'core/convert/factorize.py',
     'both = torch.cat((up, (w @ mean - up @ (down @ mean))[:, None]), dim=1).split((len(w_k), len(w_v)))',
     'both = torch.cat((up, 0 * (w @ mean)[:, None]), dim=1).split((len(w_k), len(w_v)))', 'factorize'),
    ('balance works the wrong way', 'core/convert/factorize.py',
     'ratio = (norm(w_v @ half) / norm(w_k @ half)).item() if balance else 1.0',
     'ratio = (norm(w_k @ half) / norm(w_v @ half)).item() if balance else 1.0', 'factorize'),
    ('induction is scored at the match itself', 'analysis/induction.py',
     "'induction': pattern[sequence, :, query, match + 1].mean(1),",
     "'induction': pattern[sequence, :, query, match].mean(1),", 'induction'),
    ('chance is off by one', 'analysis/induction.py', 'return (1.0 / (repeats.query.double() + 1)).mean().item()',
     'return (1.0 / repeats.query.double()).mean().item()', 'induction repeats'),
    ('the interval covers 90 %', 'analysis/stats.py', 'tail = (1 - level) / 2', 'tail = 1 - level', 'stats'),
    ('keys and values move by what is left of a step', 'ops/optimizers.py', 'view.lerp_(old, 1 - share)',
     'view.lerp_(old, share)', 'optimizers'),
    ('Muon takes fused matrices as one', 'ops/optimizers.py', 'for rows in parts or [slice(0, parameter.size(0))]:',
     'for rows in [slice(0, parameter.size(0))]:', 'optimizers'),
    ('two unequal tensors become one head', 'core/runs/models.py', "args.setdefault('tied', same)",
     "args.setdefault('tied', True)", 'models'),
    ('keys are rotated whole by the positions of the newest tokens', 'model_mla.py',
     'return apply_rope(k, self.angles[:, : k.size(2)]), v', 'return apply_rope(k, self.angles[:, -k.size(2) :]), v',
     'cache'),
    ('numbers in few bits lie at the lower end of their level', 'ops/packed.py',
     'return levels.to(dtype).add_(0.5).mul_(scale)', 'return levels.to(dtype).mul_(scale)', 'packed'),
    ('integer scores forget the half level', 'ops/packed.py',
     'scores = worth @ multiply(k.low, queries.mT).mT + few.sum(-1, keepdim=True) / 2',
     'scores = worth @ multiply(k.low, queries.mT).mT', 'packed'),
    ('all digits of the softmax count alike', 'ops/packed.py', 'places = q.new_tensor((1, 1 / BASE, BASE**-2))',
     'places = q.new_tensor((1, 1, 1))', 'packed'),
    ('content is kept in place of the rotated key', 'ops/packed.py',
     'high = torch.cat((scale, x[..., self.few :].bfloat16()), dim=-1)',
     'high = torch.cat((scale, x[..., : self.wide].bfloat16()), dim=-1)', 'packed cache_bits'),
    ('keys are mixed and queries are not', 'ops/packed.py',
     'rows, k, v = k.mixed(q.to(dtype) * scale), k.to(dtype), v.to(dtype)',
     'rows, k, v = q.to(dtype) * scale, k.to(dtype), v.to(dtype)', 'cache_bits'),
    ('a compiled row loses the scales of an int8 weight', 'ops/kernels.py',
     'return self.levels.to(dtype) * self.scale.to(dtype)', 'return self.levels.to(dtype)', 'compiled int8'),
    ('half of a compiled row is left out', 'ops/kernels.py', 'weight.to(torch.float32).chunk(4, dim=-1)], dim=-1)',
     'weight.to(torch.float32).chunk(4, dim=-1)[:2] * 2], dim=-1)', 'compiled'),
    ('each piece of a cache in few bits is compiled', 'ops/packed.py', 'if torch.compiler.is_compiling():',
     'if False:', 'compiled'),
    ('processes may resume different checkpoints', 'train.py',
     "if not processes.agree(-1 if resumed is None else resumed.get('iter_num') or 0):",
     'if False:', 'processes'),
    ("the lock of another process's folder is removed", 'core/cli/locks.py', 'if self.is_current(self.file):',
     'if True:', 'folder'),
]  # fmt: skip


def files_of(root, name):
    """The paths of the files below root/tests that are called test_NAME.py."""
    return sorted(Path(root).glob(f'tests/*/test_{name}.py'))


def outcome(file, before, after, tests):
    """What notices the mutation: 'test_file::test' of the first that fails, or 'nothing'."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(['git', 'archive', 'HEAD'], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(['tar', 'x', '-C', folder], input=archive, check=True)
        mutant = Path(folder, file)
        text = mutant.read_text()
        if text.count(before + '\n') != 1:
            raise SystemExit(f'{file} has the line {before!r} {text.count(before)} times, not once')
        mutant.write_text(text.replace(before + '\n', after + '\n'))
        files = [file for name in tests.split() for file in files_of(folder, name)]
        command = [sys.executable, '-m', 'pytest', '-q', '-x', *files]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                              env=dict(os.environ, OMP_NUM_THREADS='1'))  # fmt: skip
        failed = [line.split(' ')[1] for line in done.stdout.splitlines() if line.startswith(('FAILED', 'ERROR'))]
        if done.returncode > 1 and not failed:
            raise SystemExit(f'the tests did not run:\n{done.stdout}\n{done.stderr}')
        return failed[0].removeprefix('tests/') if failed else 'nothing'


if __name__ == '__main__':
    chosen = [int(number) for number in sys.argv[1:]] or range(1, len(MUTATIONS) + 1)
    print('| | mutation | in | noticed by |\n|---|---|---|---|')
    caught = 0
    for number in chosen:
        what, file, before, after, tests = MUTATIONS[number - 1]
        found = outcome(file, before, after, tests)
        caught += found != 'nothing'
        print(f'| {number} | {what} | `{file}` | {found} |', flush=True)
    print(f'\n{caught} of {len(chosen)} mutations were noticed.')
