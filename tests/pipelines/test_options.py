"""Flags that commands share: rows, and errors in the words of the command line."""

from __future__ import annotations

import pytest

from pipelines.options import in_flags, row_range
from vqmill.errors import UsageError


@pytest.mark.parametrize(
    ("text", "number", "rows"),
    [
        ("0:100", 100, range(100)), (":", 100, range(100)), ("90:", 100, range(90, 100)), (":3", 100, range(3)),
        (None, 100, range(16)), (None, 5, range(5)),
    ],
)  # fmt: skip
def test_rows_that_are_there(text: str | None, number: int, rows: range) -> None:
    assert row_range(text, number) == rows


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        ("90:120", 100, "--rows 90:120: rows 100:120 are not there; the store has rows 0:100."),
        (":101", 100, "--rows :101: rows 100:101 are not there; the store has rows 0:100."),
        ("100:", 100, "--rows 100:: no rows there; the store has rows 0:100."),
        ("100:120", 100, "no rows there"),
        ("7:3", 100, "no rows there"),
        ("0:0", 100, "no rows there"),
        (None, 0, "no rows there; the store has rows 0:0."),
        ("-3:", 100, "expected START:STOP"),
        ("3", 100, "expected START:STOP"),
    ],
)
def test_rows_that_are_not_all_there_are_refused(text: str | None, number: int, message: str) -> None:
    with pytest.raises(UsageError) as error:
        row_range(text, number)
    assert message in str(error.value)


def test_only_whole_words_become_flags() -> None:
    flags = {"top_k": "--top-k", "labels": "--label"}
    assert in_flags("top_k: a stop_k, not labels.", flags) == "--top-k: a stop_k, not --label."
