"""Settings: what differs is shown, and what is nearly right is suggested."""

from __future__ import annotations

import pytest

from vqmill.errors import UsageError
from vqmill.settings import did_you_mean, different_settings, refuse_other_settings


def test_the_nearest_name_is_suggested_or_none():
    assert did_you_mean("rgb23", ["grey28", "rgb32"]) == " Did you mean 'rgb32'?"
    assert did_you_mean("gray28", {"rgb32": 1, "grey28": 2}) == " Did you mean 'grey28'?"
    assert did_you_mean("zebra", ["grey28", "rgb32"]) == ""
    assert did_you_mean("rgb32", []) == ""


def test_other_settings_are_refused_line_by_line():
    found, wanted = {"fit": {"seed": 0, "steps": 5}, "size": 32}, {"fit": {"seed": 1, "steps": 5}, "size": 28}
    with pytest.raises(UsageError) as caught:
        refuse_other_settings("out", found, wanted, "Choose another --out.")
    assert str(caught.value).splitlines() == [
        "out: exists with other settings:",
        "  size: there 32, now 28",
        "  fit.seed: there 0, now 1",
        "Choose another --out.",
    ]


def test_what_matters_comes_first_and_many_are_counted():
    def settings(value):
        return {
            "store": {"tokenizer": {"fingerprint": value, "preset": value}, "plan": value},
            "prior": {"networks": [{"depth": value, "kind": value}] * 4, "preset": value},
            "fit": {"seed": value, "steps": value},
            "holdout": value,
        }

    assert [line.partition(": there 1, now 2")[0] for line in different_settings(settings(1), settings(2))] == [
        "prior.preset", "store.tokenizer.preset", "store.tokenizer.fingerprint", "store.plan", "holdout", "fit.seed", "fit.steps",
        "prior.networks.0.depth", "prior.networks.0.kind", "prior.networks.1.depth", "and 5 more",
    ]  # fmt: skip
    assert len(different_settings(settings(1), settings(2), most=15)) == 15, "and no line about others"
    assert different_settings({"prior": "a", "num": 1}, {"prior": "b", "num": 2})[0].startswith("prior: ")


def test_equal_settings_pass():
    refuse_other_settings("out", {"names": ["a", "b"]}, {"names": ("a", "b")}, "")
    refuse_other_settings("out", {"absent": None}, {}, "")


def test_a_missing_setting_differs():
    assert different_settings({}, {"fit": {"seed": 1}}) == ['fit: there null, now {"seed": 1}']
