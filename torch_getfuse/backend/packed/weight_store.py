"""The weights of all convolutions of a fast program, made ready once and proved at every call.

What was made is used only where every byte that it was made from is what the call gives. So it is
right after an optimizer step, a ``load_state_dict``, a write through ``.data``, a NumPy array or
shared memory, and for another instance of the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_getfuse.backend.packed.live_conv import LiveConv
from torch_getfuse.backend.packed.packed_conv import NotFinite, PackedConv
from torch_getfuse.backend.packed.snapshots import Kept

Ready = Callable[[Sequence[Any]], Any]
"""From the values of a call by slot to the weights of one convolution, made ready."""


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

    def prepare(self, weights: Iterator[Tensor], vectors: Iterator[Tensor]) -> Any:
        """What the convolution needs, from the next weight, if it keeps any of it, and vectors."""
        own = [next(vectors) for _ in self.vectors]
        if isinstance(self.conv, LiveConv):
            return self.conv.prepare(own)
        return self.conv.prepare(next(weights), own)

    def anew(self, env: Sequence[Any]) -> Any:
        """The same from the values of a call: for weights that the graph computes."""
        return self.prepare(iter([env[self.weight]]), (env[slot] for slot in self.vectors))


class ConvStore:
    """Weights made ready, for the calls of one program.

    Args:
        convs: in the order of :meth:`ready`.
        guarded: whether shapes, layouts and types of the weights are guarded from call to call,
            as Dynamo guards those of inputs.
    """

    def __init__(self, convs: Sequence[ConvSlots], guarded: bool) -> None:
        self._convs = tuple(convs)
        self._vectors = [slot for conv in convs for slot in conv.vectors]
        self._sizes = [conv.channels for conv in convs for _ in conv.vectors]
        self._weights = [conv.weight for conv in convs if isinstance(conv.conv, PackedConv)]
        self._kept = Kept(self._make, guarded)

    def ready(self, env: Sequence[Any]) -> tuple[Any, ...]:
        """What each convolution needs for this call, made now or before.

        Args:
            env: the values of the call by slot.

        Raises:
            NotFinite: where weights hold infinities or NaN.
        """
        if not self._convs:
            return ()
        contents = [env[slot] for slot in self._weights]
        if self._vectors:  # in one tensor, which costs less to compare
            contents.append(torch.cat([env[slot] for slot in self._vectors]))
        made = self._kept.get(env[self._convs[0].weight], contents)
        if made is None:
            raise NotFinite
        return made

    def _make(self, contents: Sequence[Tensor]) -> tuple[Any, ...] | None:
        weights = iter(contents)
        vectors = iter(contents[-1].split(self._sizes) if self._vectors else ())
        try:
            return tuple(conv.prepare(weights, vectors) for conv in self._convs)
        except NotFinite:
            return None
