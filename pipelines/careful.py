"""Careful mode: decodes files where a decoder that dies, hangs or eats memory harms nothing, and says which file it was.

A helper process, which has loaded the decoders and decodes nothing itself, forks a process for a few files at a time. What dies is tried
again file by file, each alone in its process, so that no file is blamed for its neighbour. Only JSON and pixels come back: nothing that
was near a hostile file is unpickled.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import IO, Any

import numpy as np
import torch

from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.grouping import MAX_SAMPLE_BYTES
from pipelines.corpus.images import Decoded, Preprocessing, prepare
from pipelines.corpus.problems import BadImage, Reason
from pipelines.corpus.samples import RawSample
from pipelines.errors import RunFailed

SAMPLE_TIMEOUT = 60  # seconds; decoding takes a thousandth of it
TRIES = 3  # a kill from outside, as for want of memory, looks like a death of the file's making; three in a row alone do not
TOGETHER = 16  # files that one process decodes: forking takes longer than decoding small images
TOGETHER_BYTES = 16 << 20  # or more of one file; of large ones a few would take much memory, and forking little time
MEMORY_FACTOR = 4  # what decoding may take of what it is reckoned to: only a decoder out of its mind meets the limit
_DEADLY = (Reason.CRASHED, Reason.TIMED_OUT, Reason.OUT_OF_MEMORY)


class CarefulDecoder:
    """Decodes samples one after the other, whatever their decoders do. What comes out is a function of the sample alone.

    Use it as a context manager: it holds a process.
    """

    def __init__(self, preprocessing: Preprocessing, timeout: float) -> None:
        """Starts the helper.

        Args:
            preprocessing: what images are made into.
            timeout: seconds that decoding one may take.
        """
        self._preprocessing, self._timeout = preprocessing, timeout
        self._helper = self._start()

    def __enter__(self) -> CarefulDecoder:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def outcomes(self, samples: Iterator[RawSample]) -> Iterator[tuple[RawSample, Decoded | BadImage]]:
        """Each sample with its pixels, or with why it has none; see `decode_sample`.

        Samples that died, hung or ran out of memory each time they were alone have the reasons `crashed`, `timed_out` and `out_of_memory`.

        Raises:
            RunFailed: the helper does not live.
        """
        group: list[RawSample] = []
        for sample in samples:
            group.append(sample)
            if len(group) == TOGETHER or _num_bytes(group) >= TOGETHER_BYTES:
                yield from self._outcomes_of(group)
                group = []
        yield from self._outcomes_of(group)

    def _outcomes_of(self, group: Sequence[RawSample]) -> Iterator[tuple[RawSample, Decoded | BadImage]]:
        decoded = iter(self._decode([sample.image for sample in group if isinstance(sample.image, bytes)]))
        for sample in group:
            yield sample, next(decoded) if isinstance(sample.image, bytes) else self._without_decoder(sample)

    def _without_decoder(self, sample: RawSample) -> Decoded | BadImage:
        try:
            return decode_sample(sample, self._preprocessing)
        except BadImage as problem:
            return problem

    def _decode(self, files: Sequence[bytes]) -> list[Decoded | BadImage]:
        outcomes = self._ask(files) if files else []
        return [self._decode_alone(file) for file in files] if any(map(_is_deadly, outcomes)) else outcomes

    def _decode_alone(self, file: bytes) -> Decoded | BadImage:
        for _ in range(TRIES - 1):
            outcome = self._ask([file])[0]
            if not _is_deadly(outcome):
                return outcome
        return self._ask([file])[0]

    def _ask(self, files: Sequence[bytes]) -> list[Decoded | BadImage]:
        """What one process makes of some files; the same verdict on all of them when it died."""
        for _ in range(TRIES):
            assert self._helper.stdin
            assert self._helper.stdout
            try:
                _send(self._helper.stdin, None, files)
                facts, pixels = _receive(self._helper.stdout)
            except (EOFError, BrokenPipeError):  # the helper was killed: from outside, since it decodes nothing
                self._stop()
                self._helper = self._start()
            else:
                return [self._outcome(*found) for found in zip(facts, pixels, strict=True)]
        raise RunFailed(
            f"careful mode: its helper process ended {TRIES} times; its worker's log in Ray's folder says why."
        )

    def _outcome(self, facts: dict[str, Any], pixels: bytes) -> Decoded | BadImage:
        if "reason" in facts:
            return BadImage(Reason(facts["reason"]), facts["detail"])
        shape = (self._preprocessing.channels, self._preprocessing.size, self._preprocessing.size)
        return Decoded(np.frombuffer(pixels, np.uint8).reshape(shape), **facts)

    def _start(self) -> subprocess.Popen[bytes]:
        settings = json.dumps({"preprocessing": asdict(self._preprocessing), "timeout": self._timeout})
        path = os.pathsep.join(filter(None, sys.path))  # Ray tells its workers alone where the driver's modules are
        # Forking is safe in a process of one thread.
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "pipelines.careful", settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread, "PYTHONPATH": path},
        )

    def _stop(self) -> None:
        self._helper.kill()
        self._helper.communicate()


def _num_bytes(samples: Sequence[RawSample]) -> int:
    return sum(len(sample.image) for sample in samples if isinstance(sample.image, bytes))


def _is_deadly(outcome: Decoded | BadImage) -> bool:
    return isinstance(outcome, BadImage) and outcome.reason in _DEADLY


def _send(stream: IO[bytes], facts: object, parts: Sequence[bytes]) -> None:
    """Writes a message: a line of JSON, and parts of any size."""
    stream.write(json.dumps({"facts": facts, "sizes": [len(part) for part in parts]}).encode() + b"\n")
    for part in parts:
        stream.write(part)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[Any, list[bytes]]:
    """Reads a message.

    Raises:
        EOFError: it ends before its end.
    """
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message = json.loads(line)
    parts = [stream.read(size) for size in message["sizes"]]
    if [len(part) for part in parts] != message["sizes"]:
        raise EOFError
    return message["facts"], parts


def main() -> None:
    """The helper: answers on stdout what it is sent on stdin, until that ends."""
    settings = json.loads(sys.argv[1])
    preprocessing = Preprocessing(
        **{**settings["preprocessing"], "background": tuple(settings["preprocessing"]["background"])}
    )
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # decoders may print
    while True:
        try:
            _, files = _receive(sys.stdin.buffer)
        except EOFError:
            return
        _send(answers, *_decode_apart(files, preprocessing, settings["timeout"]))


def _decode_apart(
    files: Sequence[bytes], preprocessing: Preprocessing, timeout: float
) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Facts and pixels of some files, decoded in a process of their own."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.close(reading)
            _limit_memory(MEMORY_FACTOR * (preprocessing.max_memory_bytes + MAX_SAMPLE_BYTES))
            with os.fdopen(writing, "wb") as stream:
                _send(stream, *_decode_here(files, preprocessing, timeout))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)  # an answer that is whole is what counts
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        try:
            answer = _receive(stream)
        except EOFError:
            answer = None
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if answer:
        return answer
    reason, detail = Reason.CRASHED, f"the process that decoded it died, {TRIES} times and alone in it"
    if status == -signal.SIGALRM:
        reason, detail = Reason.TIMED_OUT, f"decoding it took longer than {timeout:g} s, {TRIES} times and alone"
    return [{"reason": reason, "detail": detail}] * len(files), [b""] * len(files)


def _limit_memory(num_bytes: int) -> None:
    """Lets this process take so much more than it has; only Linux can say what that is."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + num_bytes, held + num_bytes))


def _decode_here(
    files: Sequence[bytes], preprocessing: Preprocessing, timeout: float
) -> tuple[list[dict[str, Any]], list[bytes]]:
    facts: list[dict[str, Any]] = []
    pixels: list[bytes] = []
    for file in files:
        signal.setitimer(signal.ITIMER_REAL, timeout)  # the kernel ends this process then
        try:
            decoded = prepare(file, preprocessing)
        except BadImage as bad:
            facts.append({"reason": bad.reason, "detail": bad.detail})
            pixels.append(b"")
        else:
            facts.append({"width": decoded.width, "height": decoded.height, "kind": decoded.kind})
            pixels.append(decoded.pixels.tobytes())
        signal.setitimer(signal.ITIMER_REAL, 0)
    return facts, pixels


if __name__ == "__main__":
    main()
