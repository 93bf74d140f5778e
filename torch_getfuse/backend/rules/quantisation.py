"""Calls that change how a tensor is stored, and compute nothing of the network: quantisation.

They have no :class:`~torch_getfuse.backend.rules.rule.OpRule`, since they are no operators: capture
folds them into what writes or reads the tensor (``backend/capture/quantisation.py``). The names are
those of PT2E (``quantized_decomposed``) and of torchao's own quantisation (``torchao``).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any


class Quantisation(enum.Enum):
    """What such a call does."""

    QUANTIZE = "quantize"
    DEQUANTIZE = "dequantize"
    CHOOSE = "choose scales and zero points from the values"


_LIBRARIES = ("quantized_decomposed", "torchao")
_BEGINNINGS = {
    "quantize_": Quantisation.QUANTIZE,
    "dequantize_": Quantisation.DEQUANTIZE,
    "choose_qparams": Quantisation.CHOOSE,
}


def quantisation_of(name: str) -> Quantisation | None:
    """What a call of this full name (``"library::operator"``) does; ``None`` for any other."""
    library, _, operator = name.partition("::")
    if library not in _LIBRARIES:
        return None
    kinds = (kind for start, kind in _BEGINNINGS.items() if operator.startswith(start))
    return next(kinds, None)


def by_rows(name: str, args: Mapping[str, Any]) -> bool:
    """Whether scales that are chosen from the values are so for each run of the last axis alone."""
    if "per_token" in name:
        return True
    blocks = args.get("block_size")
    return isinstance(blocks, (list, tuple)) and all(size == 1 for size in blocks[:-1])
