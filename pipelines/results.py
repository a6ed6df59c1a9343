"""How a command ends: what it says, its JSON line, and its exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from vqmill.writer import Counts

OK, FAILED, USAGE, QUARANTINED = 0, 1, 2, 3


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
        console = Console(soft_wrap=True, highlight=False, markup=False)
        for line in self.lines:
            console.print(line)
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
