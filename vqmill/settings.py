"""Compares the settings of two runs, so that an output is resumed by the same job and refused to another; and names of settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from vqmill.errors import UsageError
from vqmill.files import JsonValue

# Names of what decides much of the rest, the most telling first: a preset brings dozens of other values with it.
FIRST = ("preset", "tokenizer", "prior", "store", "fingerprint", "tokenizer_fingerprint", "plan", "module")
MOST = 10


def refuse_other_settings(place: str, found: Mapping[str, Any], wanted: Mapping[str, Any], advice: str) -> None:
    """Says how an output that is there was made differently.

    Args:
        place: names it.
        found: the settings it was made with.
        wanted: those of now.
        advice: what to do.

    Raises:
        UsageError: they differ; see `different_settings`.
    """
    differences = different_settings(found, wanted)
    if differences:
        listing = "\n".join(f"  {line}" for line in differences)
        raise UsageError(f"{place}: exists with other settings:\n{listing}\n{advice}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about a name: the nearest known one, or nothing when none is near.

    >>> did_you_mean("rgb23", ["grey28", "rgb32"])
    " Did you mean 'rgb32'?"
    """
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def different_settings(
    found: Mapping[str, Any], wanted: Mapping[str, Any], sides: tuple[str, str] = ("there", "now"), most: int = MOST
) -> list[str]:
    """One line for each value that differs between two nested settings, which are called by the names of the two sides.

    What decides others comes first (`FIRST`), then what lies higher up; behind `most` lines there is only the number of the others.

    >>> different_settings({"seed": 0, "size": 32, "preset": "a"}, {"seed": 1, "size": 32, "preset": "b"})
    ['preset: there "a", now "b"', 'seed: there 0, now 1']
    """
    differences = sorted(_differences(found, wanted), key=lambda difference: _weight(difference[0]))
    lines = [
        f"{'.'.join(names)}: {sides[0]} {_short(there)}, {sides[1]} {_short(now)}" for names, there, now in differences
    ]
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most:,} more"]


def _weight(names: tuple[str, ...]) -> tuple[int, int, tuple[str, ...]]:
    """What sorts a setting's name: the sooner it is to be read, the smaller."""
    return FIRST.index(names[-1]) if names[-1] in FIRST else len(FIRST), len(names), names


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], JsonValue, JsonValue]]:
    """Names from the outside in, and both values, of each setting that differs."""
    for name in sorted(found.keys() | wanted.keys()):
        there, now = _by_place(found.get(name)), _by_place(wanted.get(name))
        if isinstance(there, dict) and isinstance(now, dict):
            yield from _differences(there, now, (*names, name))
        elif there != now:
            yield (*names, name), there, now


def _by_place(value: JsonValue | tuple[Any, ...]) -> JsonValue:
    """Lists and tuples are one thing in JSON, and long ones differ at a place."""
    return {str(place): item for place, item in enumerate(value)} if isinstance(value, (list, tuple)) else value


def _short(value: JsonValue) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else text[:117] + "..."
