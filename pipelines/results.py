"""How a command ends: what it says, its JSON line, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from vqmill.commits import Counts
from vqmill.spec import LevelSpec

OK, FAILED, USAGE, QUARANTINED = 0, 1, 2, 3


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: a file named `:100:` is no emoji, `[red]` no colour."""
    return Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)


def say(lines: Iterable[str]) -> None:
    """Tells people something before the work begins, on stderr: results are on stdout."""
    for line in lines:
        plain_console(stderr=True).print(line)


def printable(text: str) -> str:
    r"""The text with control characters escaped: keys come from files, and a terminal would obey them.

    >>> printable("a\x1b[2J")
    'a\\x1b[2J'
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


def one_line(text: str) -> str:
    r"""The same for a name in the middle of a line or a picture.

    >>> one_line("a\nb")
    'a\\nb'
    """
    return printable(text).replace("\n", "\\n")


def grids(levels: Iterable[LevelSpec]) -> str:
    """Levels in words, such as `top 4x4 of 512 codes, bottom 8x8 of 512 codes`."""
    return ", ".join(
        f"{level.name} {'x'.join(map(str, level.grid))} of {level.codebook_size} codes" for level in levels
    )


def preprocessing_line(record: Mapping[str, Any]) -> str:
    """How images became squares, in words, of what a store records; what it does not say is left out.

    >>> preprocessing_line({"size": 32, "fit": "crop", "background": [255, 255, 255]})
    '32 x 32 pixels, --fit crop (the middle square), background 255,255,255'
    """
    size, fit, background = (record.get(key) for key in ("size", "fit", "background"))
    shown = {"crop": "--fit crop (the middle square)", "pad": "--fit pad (all of it)"}
    words = [
        f"{size} x {size} pixels" if size else "",
        shown.get(str(fit), ""),
        f"background {','.join(map(str, background))}" if background else "",
    ]
    return ", ".join(filter(None, words))


@dataclass
class Result:
    """What a command did.

    Attributes:
        lines: for people.
        counts: input samples; seen = encoded + quarantined + skipped.
        rows: code rows.
        facts: further entries of the JSON line.
        code: the exit code; QUARANTINED is set by `finish` when samples were set aside.
        quarantine: where the samples that were set aside are listed.
    """

    lines: list[str] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    rows: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    code: int = OK
    quarantine: str = ""

    def finish(self, *, as_json: bool, seconds: float) -> int:
        """Prints it and returns the exit code."""
        console = plain_console()
        for line in self.lines:
            console.print(printable(line))
        if self.counts.quarantined and self.code == OK:
            console.print(
                f"{self.counts.quarantined:,} of {self.counts.seen:,} samples were quarantined; they are listed in {self.quarantine}"
            )
            self.code = QUARANTINED
        if as_json:
            counts = self.counts
            record = {
                "seen": counts.seen, "encoded": counts.encoded, "quarantined": counts.quarantined, "skipped": counts.skipped,
                "rows": self.rows, "seconds": round(seconds, 3), **self.facts,
            }  # fmt: skip
            console.print(json.dumps(record, ensure_ascii=False))
        return self.code
