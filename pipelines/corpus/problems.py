"""What can be wrong with a corpus (an error, before any work) and with one sample (a row with a reason)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vqmill.errors import UsageError


class CorpusError(UsageError):
    """The corpus as a whole cannot be used: a wrong path, nothing in it, a form we do not read."""


class Reason(StrEnum):
    """Why a sample cannot be used. The list is closed; the details say more."""

    TRUNCATED = "truncated"
    """The file or the shard ends too early."""
    NOT_AN_IMAGE = "not_an_image"
    """The bytes are those of no image format we know of."""
    UNSUPPORTED_FORMAT = "unsupported_format"
    """A picture, in a format or with pixels that are not read."""
    DECODE_ERROR = "decode_error"
    """Named as a format we read, but broken inside."""
    TOO_MANY_PIXELS = "too_many_pixels"
    """The header claims more pixels than the cap."""
    TOO_MANY_BYTES = "too_many_bytes"
    """The file or tar member is larger than the cap."""
    EMPTY = "empty"
    """Zero bytes."""
    MISSING_IMAGE = "missing_image"
    """A sample of a tar without an image."""
    AMBIGUOUS_IMAGE = "ambiguous_image"
    """A sample of a tar with several images, none of which is the plain one."""
    DUPLICATE_KEY = "duplicate_key"
    """A key that a tar uses more than once, so that what belongs together is uncertain."""
    BAD_LABEL = "bad_label"
    """A label that is not an integer from -1 (none) to 2^63 - 1."""
    BAD_TEXT = "bad_text"
    """A caption that is not UTF-8, or JSON that cannot be parsed."""
    DAMAGED_TAR = "damaged_tar"
    """The tar cannot be read on from here."""
    UNREADABLE = "unreadable"
    """The file has vanished, changed since the corpus was planned, or cannot be read."""
    CRASHED = "crashed"
    """Decoding it kills the process that does it."""
    TIMED_OUT = "timed_out"
    """Decoding it takes longer than the limit."""
    OUT_OF_MEMORY = "out_of_memory"
    """Decoding it takes more memory than there is, or than it is given."""
    NOT_A_VIDEO = "not_a_video"
    """The bytes are those of no video format that is read."""
    NO_VIDEO = "no_video"
    """A media file without a video stream, or with attached pictures only."""
    NO_FRAMES = "no_frames"
    """A video stream of which not one frame can be decoded."""
    ENCRYPTED = "encrypted"
    """A video that is encrypted."""
    TOO_SHORT = "too_short"
    """A video with fewer frames than a clip."""
    PARTLY_DECODED = "partly_decoded"
    """A warning: the clips that are whole became rows, and the rest of the video is lost."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one sample cannot be used.

    Attributes:
        reason: from the closed list.
        detail: one line for a person, such as a byte offset or what the decoder said.
    """

    reason: Reason
    detail: str


class BadImage(Exception):  # noqa: N818 - a fact about the data, not an error of the program
    """Bytes that do not become pixels; carries the `Problem`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)  # as given, so that it survives the way between processes
        self.problem = Problem(reason, detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"

    @property
    def reason(self) -> Reason:
        """Why, from the closed list."""
        return self.problem.reason

    @property
    def detail(self) -> str:
        """Why, in words."""
        return self.problem.detail
