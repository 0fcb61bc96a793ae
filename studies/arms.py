"""The models that a study compares: an attention, its latent size, and what else differs from the study's setting."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from analysis import style
from core.cli.errors import UserError

ATTENTIONS: dict[str, dict] = {
    'MHA': {},
    'GQA-2': dict(n_kv_head=2),
    'MQA': dict(n_kv_head=1),
    'MLA': dict(attention='mla'),
}
CHANGES: dict[str, dict] = {
    'RoPE': dict(pos='rope'),
    'Muon': dict(optimizer='muon'),
    'latent norm': dict(latent_norm=True),
    'as in 0.1.0': dict(latent_init='gpt2'),
    'R=3d/4': dict(n_rope=24),  # RoPE on 24 of a head's 32 dimensions, where others have 16
    'kv_lr=1/8': dict(kv_lr=1 / 8),
}
LOOKS = {'kv_lr=1/8': 1, 'latent norm': 2, 'as in 0.1.0': 3, 'R=3d/4': 3}  # variants of an attention's look


@dataclass(frozen=True)
class Arm:
    """One model of a study."""

    attention: str  # of ATTENTIONS
    latent: Fraction = Fraction(0)  # MLA's n_latent / n_embd
    changes: tuple[str, ...] = ()  # of CHANGES

    @property
    def label(self) -> str:
        """Its name in tables, pictures and JSON files, such as 'MLA, r=2C/3, RoPE'."""
        above, below = self.latent.as_integer_ratio()
        size = f'r={above if above > 1 else ""}C' + (f'/{below}' if below > 1 else '')
        return ', '.join((self.attention, *([size] if self.latent else []), *self.changes))

    @property
    def slug(self) -> str:
        """The same as part of a folder's name."""
        return ''.join(letter if letter.isalnum() else '-' for letter in self.label.lower().replace(', ', '-'))

    def keys(self, n_embd: int) -> dict:
        """Its keys of train.py, in a model of this width; kv_lr is always among them."""
        found = dict(ATTENTIONS[self.attention], kv_lr=1.0)
        found |= dict(n_latent=int(self.latent * n_embd)) if self.latent else {}
        for change in self.changes:
            found |= CHANGES[change]
        return found

    def look(self) -> dict:
        """How its line is drawn."""
        return style.look(self.attention, float(self.latent), max([0, *(LOOKS.get(c, 0) for c in self.changes)]))


def mla(latent: str, *changes: str) -> Arm:
    """MLA with this share of n_embd as its latent, such as '2/3'."""
    return Arm('MLA', Fraction(latent), changes)


def choose(names: str, arms: Iterable[Arm]) -> list[Arm]:
    """The arms whose labels `names` lists, separated by semicolons. UserError for an unknown one."""
    known, wanted = {arm.label: arm for arm in arms}, [name.strip() for name in names.split(';')]
    if unknown := set(wanted) - set(known):
        raise UserError(f'unknown arms: {"; ".join(sorted(unknown))}; choose from {"; ".join(known)}')
    return [known[name] for name in wanted]
