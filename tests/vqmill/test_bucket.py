"""Stores written into an S3 bucket, on a real server process: the bytes of a disk, one job at a time, whole after every kill."""

from __future__ import annotations

import itertools
import logging
import pickle
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

import vqmill
from vqmill import CodesError
from vqmill import bucket as bucket_module
from vqmill import lease as lease_module
from vqmill.bucket import Bucket
from vqmill.commits import Commit, Counts
from vqmill.errors import UsageError
from vqmill.layout import commit_file, find_spec
from vqmill.repair import repair_store
from vqmill.verify import verify_store
from vqmill.writer import StoreWriter, read_shard, write_shard


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Leases that end soon, and no patience with a server that does not answer."""
    for name, seconds in {"LEASE_SECONDS": 1.0, "RENEW_SECONDS": 0.1, "LOOK_SECONDS": 0.05}.items():
        monkeypatch.setattr(lease_module, name, seconds)
    monkeypatch.setattr(bucket_module, "RETRY", {"max_retries": 1})


def kill_after(monkeypatch, puts):
    """The process dies before it puts object number `puts` of the store; what it would do afterwards, it does not do."""
    put, asked, dead = Bucket.put, [], []

    def limited(self, file, data, known=None):
        if dead or (not file.startswith(".") and len(asked) == puts):
            dead.append(file)
            # The thread that keeps the lease dies in silence, as with its process.
            raise SystemExit if threading.current_thread().name == "lease" else Killed
        if not file.startswith("."):
            asked.append(file)
        return put(self, file, data, known)

    monkeypatch.setattr(Bucket, "put", limited)
    return asked


def test_a_store_in_a_bucket_has_the_bytes_of_one_on_a_disk(address, s3, stores, finished_store):
    labels = [None if row % 5 == 4 else row for row in range(21)]
    stores.write(f"{address}/codes.zarr", stores.two_levels, stores.codes(stores.two_levels, 21), labels)
    assert s3.objects(f"{address}/codes.zarr") == stores.files(finished_store)
    assert {name.split("/")[0] for name in s3.objects(address)} == {"codes.zarr", ".codes.zarr.lock"}
    found = verify_store(f"{address}/codes.zarr")
    here = verify_store(finished_store)
    assert found == here


def test_killed_before_every_single_put_and_resumed(address, s3, stores, monkeypatch):
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 13)
    labels = list(range(13))
    with monkeypatch.context() as patch:
        asked = kill_after(patch, None)
        stores.write(f"{address}/whole.zarr", spec, codes, labels)
    expected = s3.objects(f"{address}/whole.zarr")
    assert len(asked) >= 4 + 2 * (5 + 5) + 1  # create, two Zarr shards with their commits, finish
    seen = set()
    for after in range(len(asked)):
        url = f"{address}/{after}.zarr"
        with monkeypatch.context() as patch:
            kill_after(patch, after)
            with pytest.raises(Killed):
                stores.write(url, spec, codes, labels)
        if (found := find_spec(url)) is not None:
            with pytest.raises(CodesError, match="unfinished"):
                vqmill.open_codes(url)
            read = vqmill.open_codes(url, allow_incomplete=True)
            seen.add(len(read))
            assert len(read) == found.num_rows
            for name, values in codes.items():
                np.testing.assert_array_equal(read[name][:], values[: len(read)])
            assert read.samples()["label"].to_pylist() == labels[: len(read)]
            assert not verify_store(url).damage
        stores.write(url, spec, codes, labels)
        assert s3.objects(url) == expected, f"killed before put {after}"
    assert seen == {0, 8, 13}


def test_a_living_job_keeps_others_out(address, stores):
    url = f"{address}/codes.zarr"
    with StoreWriter(url, stores.two_levels):
        for _ in range(2):
            with pytest.raises(UsageError, match=r"codes\.zarr: locked by process \d+ on .*Another job"):
                StoreWriter(url, stores.two_levels)
        with pytest.raises(UsageError, match="locked by process"):
            repair_store(url)
        StoreWriter(f"{address}/other.zarr", stores.two_levels).close()
    start = time.monotonic()
    StoreWriter(url, stores.two_levels).close()
    assert time.monotonic() - start < lease_module.LEASE_SECONDS, "a lease that was given back is not waited for"


def test_a_dead_job_is_taken_over_and_stops_when_it_wakes_up(address, s3, stores, caplog):
    url, spec = f"{address}/codes.zarr", stores.two_levels
    asleep = StoreWriter(url, spec)
    asleep._hold._closed.set()  # no more renewals
    codes = stores.codes(spec, 8)
    files = write_shard(url, spec, 0, codes, stores.samples([None] * 8), stores.quarantine(0))
    cursor = replace(asleep.cursor, input_shard=1)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        stores.write(url, spec, codes)
    assert time.monotonic() - start >= lease_module.LEASE_SECONDS
    assert "waiting up to" in caplog.text
    before = s3.objects(url)
    with pytest.raises(CodesError, match="another one took the store over"):
        asleep.commit(8, cursor, Counts(8), files)
    asleep._hold._lost = False
    asleep._hold.check = lambda: None  # it fell asleep between the asking and the writing
    with pytest.raises(CodesError, match="another one took the store over"):
        asleep._hold.publish(b"{}")
    asleep.close()
    assert s3.objects(url) == before


def test_a_job_that_slept_while_nobody_came_goes_on(address, s3, stores):
    url, spec = f"{address}/codes.zarr", stores.two_levels
    with StoreWriter(url, spec) as writer:
        writer._hold._closed.set()
        time.sleep(lease_module.LEASE_SECONDS)
        writer.finish()
        writer._hold._closed.clear()
    assert find_spec(url).complete
    assert b'"owner": null' in s3.objects(address)[".codes.zarr.lock"]


@pytest.mark.parametrize("lost", ["lease", "group"])
def test_an_answer_that_was_lost_is_no_conflict(address, stores, monkeypatch, lost):
    """The put came through, and the client, which has not heard so, asks again."""
    url, put = f"{address}/codes.zarr", Bucket.put

    def twice(self, file, data, known=None):
        found = put(self, file, data, known)
        again = isinstance(known, dict) and file == (".codes.zarr.lock" if lost == "lease" else "zarr.json")
        return put(self, file, data, known) if again and b"owner" in data + b"owner" else found

    with StoreWriter(url, stores.two_levels) as writer:
        monkeypatch.setattr(Bucket, "put", twice)
        time.sleep(3 * lease_module.RENEW_SECONDS)
        writer.finish()
        monkeypatch.setattr(Bucket, "put", put)
    assert find_spec(url).complete


@pytest.mark.parametrize("ignored", ["create", "update"])
def test_a_server_without_conditions_is_refused(address, stores, monkeypatch, ignored):
    put = Bucket.put

    def careless(self, file, data, known=None):
        return put(self, file, data, None if isinstance(known, dict) == (ignored == "update") else known)

    monkeypatch.setattr(Bucket, "put", careless)
    with pytest.raises(UsageError, match="does not write on conditions"):
        StoreWriter(f"{address}/codes.zarr", stores.two_levels)
    assert find_spec(f"{address}/codes.zarr") is None


def test_what_is_damaged_is_named_taken_away_and_made_again(address, s3, stores):
    url, spec, codes = f"{address}/codes.zarr", stores.two_levels, stores.codes(stores.two_levels, 21)
    spec = replace(spec, corpus={**spec.corpus, "num_samples": 24})
    stores.write(url, spec, codes)
    whole, place = s3.objects(url), Bucket(url)
    flipped = bytearray(whole["top/c/1/0/0"])
    flipped[20] ^= 1
    place.write("top/c/1/0/0", bytes(flipped))
    place.delete(["bottom/c/0/0/0"])
    place.write("stray", b"x")
    place.write("label/zarr.json", b"x")
    quick = {problem.file: problem.wrong for problem in verify_store(url, quick=True).damage}
    assert quick.keys() == {"bottom/c/0/0/0", "stray", "label/zarr.json"}
    problems = {problem.file: problem for problem in verify_store(url).damage}
    assert problems.keys() == {*quick, "top/c/1/0/0"}
    assert problems["bottom/c/0/0/0"].wrong == "missing"
    assert problems["top/c/1/0/0"].rows == (8, 15)
    assert "SHA-256" in problems["top/c/1/0/0"].wrong
    assert f"vqmill repair {url}" in problems["stray"].advice
    assert not repair_store(url).complete
    with StoreWriter(url, spec) as writer:
        assert writer.missing_shards() == [0, 1]
        for shard in (0, 1):
            rows = {name: values[shard * 8 : shard * 8 + 8] for name, values in codes.items()}
            samples = stores.samples([None] * 8, shard * 8)
            files = write_shard(url, writer.spec, shard, rows, samples, stores.quarantine(shard), None)
            writer.accept_again(shard, files)
        writer.finish()
    assert s3.objects(url) == whole


def test_a_shard_is_read_back(address, stores):
    url, codes = f"{address}/codes.zarr", stores.codes(stores.two_levels, 21)
    stores.write(url, stores.two_levels, codes)
    record = Commit.read(url, commit_file(2))
    read, samples, _ = read_shard(url, stores.two_levels, record)
    np.testing.assert_array_equal(read["top"], codes["top"][16:])
    assert samples.num_rows == 5
    Bucket(url).delete(["top/c/2/0/0"])
    with pytest.raises(CodesError, match=rf"{url}/top/c/2/0/0: missing\. See: vqmill verify {url}"):
        read_shard(url, stores.two_levels, record)


def test_places_that_are_taken_or_none_are_refused(address, s3, stores):
    Bucket(f"{address}/photos").write("holiday.jpg", b"x")
    with pytest.raises(UsageError, match=r"not a code store's \(holiday\.jpg\)"):
        StoreWriter(f"{address}/photos", stores.two_levels)
    with pytest.raises(UsageError, match="a whole bucket"):
        StoreWriter(f"s3://{s3.bucket}", stores.two_levels)
    assert s3.objects(f"{address}/photos") == {"holiday.jpg": b"x"}


def test_a_fault_that_stays_names_bucket_and_key(s3, stores, monkeypatch):
    with pytest.raises(OSError, match=r"s3://no-such-bucket/\.codes\.zarr\.lock: cannot be written: .*404"):
        StoreWriter("s3://no-such-bucket/codes.zarr", stores.two_levels)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    place = Bucket("s3://corpora/codes.zarr")
    for request in (
        lambda: place.write("top/c/0/0/0", b"x"),
        lambda: place.delete(["top/c/0/0/0"]),
        lambda: place.list(),
        lambda: Commit.read(place, "commits/shard-000000.json"),
        lambda: find_spec(place),
    ):
        with pytest.raises(OSError, match=r"s3://corpora/codes\.zarr") as error:
            request()
        assert s3.secret not in f"{error.value!r} {error.value.__cause__!r}"


def test_signed_queries_are_left_out_of_messages():
    signed = Exception(
        "PUT https://store.example/a/b?sv=1&sig=SECRET) failed: https://x.example/y?token=SECRET\nDebug: SECRET"
    )
    assert bucket_module._said(signed) == "PUT https://store.example/a/b) failed: https://x.example/y"


def test_a_copy_for_another_process_holds_no_secret(s3):
    place = Bucket("s3://corpora/codes.zarr/")
    data = pickle.dumps(place)
    assert s3.secret.encode() not in data
    assert pickle.loads(data).name == place.name == "s3://corpora/codes.zarr"
    assert s3.secret not in repr(place)


def test_many_objects_are_listed_and_deleted(address):
    place = Bucket(address)
    names = [f"{number:04d}" for number in range(1100)]
    for name in names:
        place.write(name, b"12")
    assert place.list() == dict.fromkeys(names, 2)
    place.delete([*names[1:], "not-there"])
    assert place.list() == {"0000": 2}


def test_growing_in_a_bucket_gives_the_bytes_of_a_disk(address, s3, stores, tmp_path):
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 21)
    local = tmp_path / "codes.zarr"
    for where, stop in itertools.product((local, f"{address}/codes.zarr"), (1, 2, None)):
        stores.write(where, spec, codes, stop_after=stop, finish=stop is None)
    assert s3.objects(f"{address}/codes.zarr") == stores.files(local)
