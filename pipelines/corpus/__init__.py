"""Corpora of images: folders, tar shards and the idx archives of the MNIST family; decoding; the stream that training reads.

The stream that training reads is in `pipelines.corpus.stream`.
"""

from pipelines.corpus.images import Augmentation, Decoded, Preprocessing, View, decode_image, prepare, prepare_array
from pipelines.corpus.plan import InputShard, Plan, plan_corpus
from pipelines.corpus.problems import BadImage, CorpusError, Problem, Reason
from pipelines.corpus.samples import RawSample, SampleRef, list_samples, load_sample, read_samples

__all__ = [
    "Augmentation",
    "BadImage",
    "CorpusError",
    "Decoded",
    "InputShard",
    "Plan",
    "Preprocessing",
    "Problem",
    "RawSample",
    "Reason",
    "SampleRef",
    "View",
    "decode_image",
    "list_samples",
    "load_sample",
    "plan_corpus",
    "prepare",
    "prepare_array",
    "read_samples",
]
