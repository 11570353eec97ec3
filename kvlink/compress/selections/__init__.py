"""The arithmetic of the selections: evidence to scores of every position.

Each method of `kvlink.selection.METHODS` but `all` has a module of its name here, `+` as `_`, with one function:

    score(evidence, selection, shape) → scores [L, Hkv, T]

Does not know: how many positions are kept. Place on the path: under `compress.select`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import cast

from torch import Tensor

from kvlink.cache import Evidence
from kvlink.payload import CacheShape
from kvlink.selection import METHODS, Selection

Scorer = Callable[[Evidence, Selection, CacheShape], Tensor]


@functools.cache
def scorer(method: str) -> Scorer:
    """The scorer of a method of the table. Raises KeyError for any other name."""
    METHODS[method]
    return cast(Scorer, importlib.import_module(f"{__name__}.{method.replace('+', '_')}").score)
