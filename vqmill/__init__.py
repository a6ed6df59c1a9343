"""vqmill: stores of discrete codes, and how to read them.

>>> import vqmill
>>> codes = vqmill.open_codes("codes.zarr")              # doctest: +SKIP
>>> for batch in codes.batches(256, shuffle=True):       # doctest: +SKIP
...     batch["codes"], batch["label"]
"""

from typing import TYPE_CHECKING, Any

from vqmill.errors import CodesError
from vqmill.mix import MixedBatches
from vqmill.spec import LevelSpec, StoreSpec
from vqmill.store import Codes, LevelArray, open_codes

if TYPE_CHECKING:
    from vqmill.torch_data import CodesDataset

__version__ = "0.1.0"
__all__ = ["Codes", "CodesDataset", "CodesError", "LevelArray", "LevelSpec", "MixedBatches", "StoreSpec", "open_codes"]


def __getattr__(name: str) -> Any:
    """`CodesDataset` needs torch, which is imported when it is first asked for."""
    if name == "CodesDataset":
        from vqmill.torch_data import CodesDataset

        return CodesDataset
    raise AttributeError(f"module 'vqmill' has no attribute {name!r}")
