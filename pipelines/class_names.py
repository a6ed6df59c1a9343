"""Classes by their names: which one people mean, and what it is called in lines and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipelines.results import one_line
from vqmill.errors import UsageError
from vqmill.settings import did_you_mean

EACH = "each"
MOST_DIGITS = 18  # of a number that is looked at; Python refuses to read very long ones


def name_of(label: int, names: Sequence[str]) -> str:
    """The name of a class, or nothing: there may be fewer names than classes, and label -1 is no class.

    >>> name_of(1, ["cat", "dog"]), name_of(2, ["cat", "dog"]), name_of(-1, ["cat", "dog"])
    ('dog', '', '')
    """
    return names[label] if 0 <= label < len(names) else ""


def heading(label: int, names: Sequence[str], fits: Callable[[str], bool] = bool) -> str:
    """How a class is called above its pictures: by its name, after its number where the name is shared, a number, or not shown whole.

    >>> [heading(label, ["cat", "dog", "3", "dog", ""]) for label in range(6)]
    ['cat', '1 dog', '2 3', '3 dog', '4', '5']

    Args:
        label: its number.
        names: by label.
        fits: whether a text can be shown whole.
    """
    name = name_of(label, names)
    alone = name and fits(name) and names.count(name) == 1 and (name == str(label) or not name.isdecimal())
    return name if alone else f"{label} {name}".strip()


def label_words(label: int, name: str) -> str:
    """How a class is called in a line.

    >>> label_words(1, "dog"), label_words(2, "")
    ('label 1 (dog)', 'label 2')
    """
    return f"label {label} ({one_line(name)})" if name else f"label {label}"


def find_class(text: str, num_classes: int, names: Sequence[str]) -> tuple[int, str]:
    """The class that `--label` names: by its number, by its name, or by its name but for upper and lower case, in this order.

    >>> find_class("dog", 3, ["cat", "Dog"])
    (1, '')

    Args:
        text: what was typed.
        num_classes: labels lie in [0, num_classes).
        names: by label; empty, or fewer than classes, when not all have one.

    Returns:
        The label, and what is to be said of it: another class has this number for its name.

    Raises:
        UsageError: no class is called so, or more than one.
    """
    namesakes = _called(text, names)
    if text.isdecimal() and len(text) <= MOST_DIGITS and int(text) < num_classes:
        label = int(text)
        if others := [f"class {other}" for other in namesakes if other != label]:
            return (
                label,
                f"--label {text}: taken for {label_words(label, name_of(label, names))}; {' and '.join(others)} is named so",
            )
        return label, ""
    if len(namesakes) == 1:
        return namesakes[0], ""
    if namesakes:
        numbers = " and ".join(map(str, namesakes))
        raise UsageError(f"--label {text!r}: the classes {numbers} are named so. Give one of the numbers.")
    if text.isdecimal():
        raise UsageError(f"--label {text}: this prior knows the classes 0..{num_classes - 1}.")
    known = f"a class number 0..{num_classes - 1}, {'a class name, ' if any(names) else ''}or {EACH}"
    without = (
        ""
        if any(names)
        else " This prior has no names for its classes: its store had none, or it is from an earlier version."
    )
    raise UsageError(f"--label {text!r}: expected {known}.{did_you_mean(text, [*filter(None, names), EACH])}{without}")


def _called(text: str, names: Sequence[str]) -> list[int]:
    if not text:  # a class without a name
        return []
    same = [label for label, name in enumerate(names) if name == text]
    return same or [label for label, name in enumerate(names) if name.casefold() == text.casefold()]
