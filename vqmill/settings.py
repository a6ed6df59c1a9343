"""Compares the settings of two runs, so that an output is resumed by the same job and refused to another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vqmill.files import JsonValue


def different_settings(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One line for each value that differs between two nested settings.

    >>> list(different_settings({"seed": 0, "size": 32}, {"seed": 1, "size": 32}))
    ['seed: there 0, now 1']
    """
    for name in sorted(found.keys() | wanted.keys()):
        there, now = _by_place(found.get(name)), _by_place(wanted.get(name))
        if isinstance(there, dict) and isinstance(now, dict):
            yield from different_settings(there, now, f"{prefix}{name}.")
        elif there != now:
            yield f"{prefix}{name}: there {_short(there)}, now {_short(now)}"


def _by_place(value: JsonValue | tuple[Any, ...]) -> JsonValue:
    """Lists and tuples are one thing in JSON, and long ones differ at a place."""
    return {str(place): item for place, item in enumerate(value)} if isinstance(value, (list, tuple)) else value


def _short(value: JsonValue) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else text[:117] + "..."
