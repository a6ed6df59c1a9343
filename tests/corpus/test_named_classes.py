"""`classes.txt` beside tars: names for the labels in `.cls`, and nothing else changes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import PermissionDeniedError

import tokenizer
import vqmill
from pipelines.corpus import CorpusError, named_classes, plan_corpus
from pipelines.tokenize import TokenizeOptions, tokenize_corpus
from vqmill.errors import UsageError

NAMES = ("cat", "grüner Hund", "", "bird", "fish")
TEXT = "cat\r\ngrüner Hund \n\nbird\nfish"


@pytest.mark.parametrize("named", ["", "/000001.tar", "/*.tar", "/{000000..000002}.tar"])
def test_names_are_those_of_the_lines(shards: Path, s3: Any, address: str, named: str) -> None:
    before = plan_corpus(f"{shards}{named}")
    (shards / "classes.txt").write_text(TEXT)
    s3.upload(shards, address)
    for corpus in (str(shards), address):
        plan = plan_corpus(f"{corpus}{named}")
        assert (plan.class_names, plan.skipped) == (NAMES, {})
    assert replace(plan_corpus(f"{shards}{named}"), class_names=()) == before
    (shards / "README.txt").touch()
    assert plan_corpus(str(shards)).skipped == {"not an image: .txt": 1}, "which it is not counted among"


def test_it_lies_in_the_folder_that_all_tars_have_in_common(shards: Path) -> None:
    (shards / "a").mkdir()
    shutil.copy(shards / "000000.tar", shards / "a" / "x.tar")
    (shards / "a" / "classes.txt").write_text("not this one\n")
    assert plan_corpus(str(shards)).class_names == ()
    assert plan_corpus(str(shards)).skipped == {"not an image: .txt": 1}
    (shards / "classes.txt").write_text("this one\n")
    assert plan_corpus(str(shards)).class_names == ("this one",)
    assert plan_corpus(str(shards)).skipped == {"not an image: .txt": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cat\n\xff\n", r"classes\.txt, line 2: not UTF-8"),
        (b"cat\nd\x1bog\n", r"classes\.txt, line 2: 'd\\x1bog' has characters that cannot be shown"),
        (b"cat\n\n\xe2\x80\xaedog\n", r"classes\.txt, line 3: .* cannot be shown"),
        (b"a\n" * 9, r"classes\.txt: 9 lines; at most 8 classes"),
        (b"a" * 65, r"classes\.txt: more than 64 bytes"),
    ],
    ids=["not UTF-8", "control", "direction", "lines", "bytes"],
)
def test_what_is_no_name_is_refused_with_its_line(
    shards: Path, s3: Any, address: str, data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_classes, "MAX_CLASSES", 8)
    monkeypatch.setattr(named_classes, "MAX_BYTES", 64)
    (shards / "classes.txt").write_bytes(data)
    s3.upload(shards, address)
    for corpus in (str(shards), address):
        with pytest.raises(CorpusError, match=message):
            plan_corpus(corpus)
    for fine in (b"", b"\n" * 8, b"a" * 64):
        (shards / "classes.txt").write_bytes(fine)
        s3.upload(shards, address)
        assert (
            plan_corpus(address).class_names
            == plan_corpus(str(shards)).class_names
            == tuple(fine.decode().splitlines())
        )


def test_who_may_not_list_a_bucket_needs_none(
    shards: Path, s3: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.upload(shards, address)
    original = obstore.get

    def get(store: Any, path: str, **options: Any) -> Any:
        if path.endswith("classes.txt"):
            raise PermissionDeniedError("403")
        return original(store, path, **options)

    monkeypatch.setattr(obstore, "get", get)
    plan = plan_corpus(f"{address}/{{000000..000002}}.tar")
    assert (plan.num_samples, plan.class_names) == (30, ())


@pytest.mark.usefixtures("ray_session", "no_fsync")
def test_a_store_goes_on_when_names_come_and_keeps_to_those_it_has(
    shards: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.zarr"
    held_back = (shards / "000002.tar").rename(tmp_path / "held-back.tar")

    def tokenize() -> tuple[str, ...]:
        options = TokenizeOptions(size=16)
        tokenize_corpus(
            plan_corpus(str(shards)), tokenizer.load(tokenizer_folder), out, options, lambda *progress: None
        )
        return vqmill.open_codes(out).class_names

    assert tokenize() == ()
    (shards / "classes.txt").write_text(TEXT)
    assert tokenize() == (), "there is nothing to do"
    held_back.rename(shards / "000002.tar")
    assert tokenize() == NAMES, "of the corpus that was appended"
    (shards / "classes.txt").write_text("dog\n")
    with pytest.raises(UsageError, match="Label 0 means 'cat'"):
        tokenize()
