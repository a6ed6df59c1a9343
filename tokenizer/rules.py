"""Which options of a tokenizer are read only where others have certain values, so that none is given in vain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tokenizer.config import TokenizerConfig
from vqmill.errors import CodesError


@dataclass(frozen=True)
class Rule:
    """Options that nothing reads unless one of some settings has one of some values.

    Attributes:
        options: names of fields of `TokenizerConfig`.
        needs: by name of a field, the values with which the options are read; one of the fields is enough.
    """

    options: tuple[str, ...]
    needs: Mapping[str, Sequence[object]]

    @property
    def words(self) -> str:
        """The needs for people, as Python and TOML write values."""
        return ", or ".join(
            f"{name} in {values[0]}..{values[-1]}"
            if isinstance(values, range)
            else f"{name} = {' or '.join(map(repr, values))}"
            for name, values in self.needs.items()
        )

    def holds(self, config: TokenizerConfig) -> bool:
        """Whether the options are read."""
        return any(getattr(config, name) in values for name, values in self.needs.items())


_LEARNED = ("ema", "gradient")
_SOME = range(1, 65)

RULES = (
    Rule(("fsq_levels",), {"quantizer": ("fsq",)}),
    Rule(("num_quantizers", "normalize", "rotation", "commitment_cost", "ema_decay"), {"quantizer": _LEARNED}),
    Rule(("codebook_start", "start_step", "pool_size"), {"quantizer": _LEARNED}),
    Rule(("revival", "revive_fraction", "revive_after"), {"quantizer": _LEARNED}),
    Rule(("start_step",), {"codebook_start": ("kmeans",)}),
    Rule(("revive_fraction",), {"revival": ("rare",)}),
    Rule(("revive_after",), {"revival": ("unused",)}),
    Rule(("pool_size",), {"codebook_start": ("kmeans",), "revival": ("rare", "unused")}),
    Rule(("num_groups",), {"architecture": ("grouped",)}),
    Rule(("residual_bias", "rectified_skip"), {"architecture": ("strided",)}),
    Rule(("residual_bias", "rectified_skip"), {"num_residual_blocks": _SOME}),
    # the other architectures have a width tied to residual_dim
    Rule(("residual_dim",), {"num_residual_blocks": _SOME, "architecture": ("unixpickle", "grouped")}),
)


def refuse_unread(config: TokenizerConfig, given: Iterable[str]) -> None:
    """Refuses options that were given and that nothing reads; a preset's values and defaults are not given.

    >>> refuse_unread(TokenizerConfig(codebook_start="normal"), ["start_step"])
    Traceback (most recent call last):
    vqmill.errors.CodesError: start_step: nothing reads it without codebook_start = 'kmeans'; found codebook_start = 'normal'. Change \
that, or leave start_step out.

    Args:
        config: what came of the options.
        given: names of the fields that a user gave.

    Raises:
        CodesError: an option has no effect; the message says which setting it needs.
    """
    for name in given:
        for rule in RULES:
            if name in rule.options and not rule.holds(config):
                found = ", ".join(f"{setting} = {getattr(config, setting)!r}" for setting in rule.needs)
                raise CodesError(
                    f"{name}: nothing reads it without {rule.words}; found {found}. Change that, or leave {name} out."
                )
