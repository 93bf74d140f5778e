"""Tensors that stay on chip between the steps of a cascade plan: stores that steps share.

A resident tensor is in a store, a ring of as many rows as it has. The step that makes it leaves the
store here, and those that read it find it here. What the split graph passes from child to child for
it is a tensor without memory (on the ``meta`` device), so that nobody can read it by mistake.

A step that runs as its FX nodes is given real tensors, filled from the stores, and its results are
put into stores: nothing of that is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torch_getfuse.backend.fx_nodes.values import is_plain
from torch_getfuse.backend.rowwise.rings import Ring, RingView
from torch_getfuse.backend.torch_private import unwrapped
from torch_getfuse.ir import Tensor


class OnChip(threading.local):
    """The stores of the calls of one split graph, apart for each thread.

    Attributes:
        stores: per sample, tensor -> its store. Steps run on the whole batch, so there is a store
            for each sample; what is counted is one sample's.
    """

    def __init__(self) -> None:
        self.stores: list[dict[str, Ring]] = []

    def start(self, samples: int) -> None:
        """Forget everything, for another call."""
        self.stores = [{} for _ in range(samples)]

    def __contains__(self, name: str) -> bool:
        return all(name in stores for stores in self.stores)

    def elements(self, but: Collection[str] = ()) -> dict[str, int]:
        """Of each store of one sample, except those of some tensors."""
        return {n: ring.elements for n, ring in self.stores[0].items() if n not in but}

    def put(self, tensor: Tensor, full: torch.Tensor) -> None:
        """Fill a store from memory."""
        for sample, stores in enumerate(self.stores):
            ring = Ring(tensor.rows, tensor.elements // tensor.rows, full.itemsize)
            part = sample_of(full, tensor, sample, len(self.stores))
            RingView(ring, tensor, full.dtype).write(0, tensor.rows, part)
            stores[tensor.name] = ring

    def take(self, tensor: Tensor, like: torch.Tensor) -> torch.Tensor:
        """What a store holds, in memory; of the sizes, strides and type of ``like``."""
        found = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")
        for sample, stores in enumerate(self.stores):
            rows = RingView(stores[tensor.name], tensor, like.dtype).read(0, tensor.rows)
            sample_of(found, tensor, sample, len(self.stores)).copy_(rows)
        return found

    def drop(self, name: str) -> None:
        """Forget a tensor that nobody reads any more."""
        for stores in self.stores:
            stores.pop(name, None)

    def copies(self, names: Collection[str]) -> list[dict[str, Ring]]:
        """Copies of some of the stores."""
        return [{n: r.copy() for n, r in stores.items() if n in names} for stores in self.stores]

    def update(self, given: Sequence[Mapping[str, Ring]]) -> None:
        """Take in stores, per sample, in the place of those of the same tensors."""
        for stores, new in zip(self.stores, given, strict=True):
            stores.update(new)


@dataclass(frozen=True)
class Stay:
    """What stays on chip around a step.

    Attributes:
        chip: the stores, shared by all steps of a split graph.
        number: of the step.
        touched: the resident tensors that it reads or makes.
        held: those of them that are on chip when it begins.
        kept: those that a later step reads.
        real: those made here that are needed in memory as well, since something that is no step
            reads them: copied there, which is not counted.
    """

    chip: OnChip = field(default_factory=OnChip)
    number: int = 0
    touched: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    real: frozenset[str] = frozenset()


class NodeStep(nn.Module):
    """A step that runs as its FX nodes, among others that leave tensors on chip.

    Args:
        child: the step's FX module.
        stay: what is on chip around it.
        samples: of the batch.
        tensors: the resident tensors, by name.
        inputs: tensor -> which of the child's inputs it is.
        outputs: tensor -> which of the child's results it is.
    """

    def __init__(
        self,
        child: nn.Module,
        stay: Stay,
        samples: int,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.child = child
        self.stay = stay
        self.samples = samples
        self.tensors = tensors
        self.inputs = {name: k for name, k in inputs.items() if name in stay.touched}
        self.outputs = {name: k for name, k in outputs.items() if name in stay.kept}

    def forward(self, *args: Any) -> Any:
        """The child's results, from real tensors; resident ones are put into stores."""
        stay, chip = self.stay, self.stay.chip
        if stay.number == 0 or not chip.stores:
            chip.start(self.samples)
        given = list(args)
        for name, place in self.inputs.items():
            if given[place].is_meta:
                given[place] = chip.take(self.tensors[name], given[place])
            elif name in stay.kept and name not in chip:
                self._put(name, given[place])
        results = self.child(*given)
        several = results if isinstance(results, tuple) else (results,)
        for name, place in self.outputs.items():
            self._put(name, several[place])
        for name in stay.touched - stay.kept:
            chip.drop(name)
        return results

    def _put(self, name: str, full: torch.Tensor) -> None:
        """Fill a store, unless what there is cannot lie in rows: then only nodes can read it."""
        tensor = self.tensors[name]
        plain = is_plain(full) and unwrapped(full) is full and full.device.type == "cpu"
        lead = [size * self.samples for size in tensor.shape[:1]]
        if plain and lead and list(full.shape) == [*lead, *tensor.shape[1:]]:
            self.stay.chip.put(tensor, full)


def sample_of(full: torch.Tensor, tensor: Tensor, sample: int, samples: int) -> torch.Tensor:
    """One sample of a batch of a tensor."""
    if samples == 1:
        return full
    lead = tensor.shape[0]
    return full.narrow(0, sample * lead, lead)
