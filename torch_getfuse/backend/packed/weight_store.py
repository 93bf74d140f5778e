"""The weights of all convolutions of a fast program, made ready once and proved at every call.

What was made is used only where every byte that it was made from is what the call gives. So it is
right after an optimizer step, a ``load_state_dict``, a write through ``.data``, a NumPy array or
shared memory, and for another instance of the class. Programs of one graph for several sizes share
copies and packed weights, which do not depend on the size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_getfuse.backend.packed.live_conv import LiveConv
from torch_getfuse.backend.packed.packed_conv import NotFinite, PackedConv
from torch_getfuse.backend.packed.snapshots import Kept


@dataclass(frozen=True)
class ConvSlots:
    """One convolution, and where a call's values hold its weights.

    Attributes:
        conv: what makes them ready.
        weight: slot of the weight.
        vectors: slots of those of bias and batch norm that there are.
        channels: of the result.
    """

    conv: PackedConv | LiveConv
    weight: int
    vectors: tuple[int, ...]
    channels: int


def prepare(conv: PackedConv | LiveConv, weight: Tensor | None, vectors: Sequence[Tensor]) -> Any:
    """What a convolution needs of its weight, if it keeps any of that, and of its vectors.

    Raises:
        NotFinite: where they hold infinities or NaN.
    """
    if isinstance(conv, LiveConv):
        return conv.prepare(vectors)
    assert weight is not None
    return conv.prepare(weight, vectors)


class ConvStore:
    """Weights made ready, for the calls of one program.

    Args:
        convs: in the order of :meth:`ready`.
        kept: where they are kept, with those of other programs of the graph.
    """

    def __init__(self, convs: Sequence[ConvSlots], kept: Kept) -> None:
        self._convs = tuple(convs)
        self._vectors = tuple(slot for conv in convs for slot in conv.vectors)
        self._sizes = [conv.channels for conv in convs for _ in conv.vectors]
        packed = [conv.weight for conv in convs if isinstance(conv.conv, PackedConv)]
        self._weights = tuple(dict.fromkeys(packed))
        self.labels: Sequence[Hashable] = (
            *self._weights,
            *([self._vectors] if self._vectors else []),
        )
        self._kept = kept

    def ready(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """What each convolution needs for this call, made now or before.

        Args:
            values: of the call, by slot.

        Raises:
            NotFinite: where weights hold infinities or NaN.
        """
        if not self._convs:
            return ()
        contents = [values[slot] for slot in self._weights]
        if self._vectors:  # in one tensor, which costs less to compare
            contents.append(torch.cat([values[slot] for slot in self._vectors]))
        made: tuple[Any, ...] | None = self._kept.get(self, values[self._convs[0].weight], contents)
        if made is None:
            raise NotFinite
        return made

    def make(self, values: Sequence[Tensor], shared: dict[Hashable, Any]) -> tuple[Any, ...] | None:
        """What :meth:`ready` gives; ``None`` where weights hold infinities or NaN.

        Args:
            values: the weights that are packed, and all vectors in one tensor.
            shared: convolutions that are ready, of programs for other sizes too.
        """
        weights = dict(zip(self._weights, values, strict=False))
        vectors = iter(values[-1].split(self._sizes) if self._vectors else ())
        made = []
        for conv in self._convs:
            own = [next(vectors) for _ in conv.vectors]
            # The vectors are those of one copy: another program may have them in another one.
            name = (conv.conv.made_of, conv.weight, conv.vectors, self._vectors)
            if name not in shared:
                try:
                    shared[name] = prepare(conv.conv, weights.get(conv.weight), own)
                except NotFinite:
                    return None
            made.append(shared[name])
        return tuple(made)
