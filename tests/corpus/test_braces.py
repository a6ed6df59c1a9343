from __future__ import annotations

import pytest

from pipelines.corpus.braces import expand_braces
from pipelines.corpus.problems import CorpusError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("plain.tar", ["plain.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("x{,y,{1..2}z}", ["x", "xy", "x1z", "x2z"]),
        ("{a,{b,c}{d,e}}", ["a", "bd", "be", "cd", "ce"]),
    ],
)
def test_expands_as_a_shell_does(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


@pytest.mark.parametrize("pattern", ["{a", "a}", "}{", "{a}", "{}", "{a..c}", "{0..9999999}", "{1..-2}"])
def test_refuses_what_is_not_clear(pattern: str) -> None:
    with pytest.raises(CorpusError, match=r"Write|Name fewer"):
        expand_braces(pattern)
