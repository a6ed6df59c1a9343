"""Classes by number and by name: which one is meant, and what is refused."""

from __future__ import annotations

import pytest

from pipelines.class_names import find_class, heading, label_words
from vqmill.errors import UsageError

NAMES = ["cat", "Dog", "7", "", "twin", "twin", "Twin", "2"]


@pytest.mark.parametrize(
    ("text", "label"),
    [("0", 0), ("007", 7), ("cat", 0), ("CAT", 0), ("dog", 1), ("Dog", 1), ("Twin", 6), ("9", 9)],
)
def test_a_class_is_found_by_its_number_or_its_name(text: str, label: int) -> None:
    assert find_class(text, 10, NAMES)[0] == label


def test_a_number_is_a_number_whatever_classes_are_named_and_that_is_said() -> None:
    assert find_class("7", 10, NAMES) == (7, "--label 7: taken for label 7 (2); class 2 is named so")
    assert find_class("7", 10, [str(label) for label in range(10)]) == (7, "")
    assert find_class("1990", 3, ["1980", "1990"]) == (1, ""), "no class has this number"


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("twin", NAMES, "the classes 4 and 5 are named so. Give one of the numbers."),
        ("TWIN", NAMES, "the classes 4 and 5 and 6 are named so."),
        ("", NAMES, "expected a class number 0..9, a class name, or each."),
        ("cta", NAMES, "Did you mean 'cat'?"),
        ("eech", NAMES, "Did you mean 'each'?"),
        ("10", NAMES, "this prior knows the classes 0..9."),
        ("-1", NAMES, "expected a class number"),
        ("cat", [], "expected a class number 0..9, or each. This prior has no names for its classes"),
    ],
)
def test_what_names_no_class_or_more_than_one_is_refused(text: str, names: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        find_class(text, 10, names)
    assert message in str(error.value)


def test_names_stay_in_their_line() -> None:
    assert label_words(3, "a\nb\x1b[2J") == "label 3 (a\\nb\\x1b[2J)"


def test_a_heading_has_the_number_where_the_name_does_not_tell() -> None:
    found = [heading(label, NAMES, lambda name: name != "Dog") for label in range(9)]
    assert found == ["cat", "1 Dog", "2 7", "3", "4 twin", "5 twin", "Twin", "7 2", "8"]
