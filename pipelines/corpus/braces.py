"""Braces in paths, as shells expand them: `x/{000..009}.tar`, `{a,b}`, several at once, nested."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipelines.corpus.problems import CorpusError

MAX_NAMES = 1_000_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", re.ASCII)


def expand_braces(pattern: str) -> list[str]:
    """All names that a pattern stands for, in the shell's order.

    >>> expand_braces("{a,b{1..2}}-{09..10}.tar")
    ['a-09.tar', 'a-10.tar', 'b1-09.tar', 'b1-10.tar', 'b2-09.tar', 'b2-10.tar']

    Ranges are of whole numbers, upwards or downwards, with an optional step; leading zeros set the width.

    Raises:
        CorpusError: a brace that is not closed or opened, that holds neither a range nor a comma, or more than a million names.
    """
    names: list[str] = []
    for name in _expand(pattern, pattern):
        if len(names) == MAX_NAMES:
            raise CorpusError(f"{pattern}: these braces stand for more than {MAX_NAMES:,} names. Name fewer shards.")
        names.append(name)
    return names


def _expand(text: str, pattern: str) -> Iterator[str]:
    start = text.find("{")
    stray = text.find("}")
    if stray >= 0 and (start < 0 or stray < start):
        raise CorpusError(f"{pattern}: '}}' without '{{' before it. Write {{000..009}} or {{a,b}}.")
    if start < 0:
        yield text
        return
    end = _closing(text, start, pattern)
    choices = _choices(text[start + 1 : end], pattern)
    for choice in choices:
        for tail in _expand(text[end + 1 :], pattern):
            yield text[:start] + choice + tail


def _closing(text: str, start: int, pattern: str) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise CorpusError(f"{pattern}: '{{' is never closed. Write {{000..009}} or {{a,b}}.")


def _choices(inside: str, pattern: str) -> Iterator[str]:
    """What one pair of braces stands for."""
    if match := _RANGE.fullmatch(inside):
        first, last, step = (match[1], match[2], int(match[3] or 1))
        padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        down = int(first) > int(last)
        numbers = range(int(first), int(last) + (-1 if down else 1), (-1 if down else 1) * max(step, 1))
        return (f"{number:0{width}}" for number in numbers)
    pieces, depth, start = [], 0, 0
    for position, letter in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            pieces.append(inside[start:position])
            start = position + 1
    if not pieces:
        raise CorpusError(f"{pattern}: '{{{inside}}}' is neither a range nor a list. Write {{000..009}} or {{a,b}}.")
    return (name for piece in [*pieces, inside[start:]] for name in _expand(piece, pattern))
