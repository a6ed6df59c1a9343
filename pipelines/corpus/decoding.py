"""From a sample as it was read to its pixels."""

from __future__ import annotations

from pipelines.corpus.images import CENTER, Decoded, Preprocessing, View, prepare
from pipelines.corpus.problems import BadImage
from pipelines.corpus.samples import RawSample


def decode_sample(sample: RawSample, preprocessing: Preprocessing, view: View = CENTER) -> Decoded:
    """The pixels of a sample, centre-cropped unless another view is asked for.

    Raises:
        BadImage: it cannot be had; the reason is one of the closed list.
    """
    if sample.problem is not None:
        raise BadImage(sample.problem.reason, sample.problem.detail)
    assert sample.image is not None, f"{sample.key}: neither an image nor a problem"
    return prepare(sample.image, preprocessing, view)
