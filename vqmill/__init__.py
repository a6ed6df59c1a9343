"""vqmill: stores of discrete codes, and how to read them.

>>> import vqmill
>>> codes = vqmill.open_codes("codes.zarr")              # doctest: +SKIP
>>> for batch in codes.batches(256, shuffle=True):       # doctest: +SKIP
...     batch["codes"], batch["label"]
"""

from vqmill.errors import CodesError
from vqmill.spec import LevelSpec, StoreSpec
from vqmill.store import Codes, LevelArray, open_codes

__version__ = "0.1.0"
__all__ = ["Codes", "CodesError", "LevelArray", "LevelSpec", "StoreSpec", "open_codes"]
