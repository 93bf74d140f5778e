"""What values show after the writes so far: in place, by index, or where ``out=`` says.

An operator of the graph makes a tensor anew, whatever torch writes over. So a write replaces a
tensor by another, and every view of the old one, made before or after it, is one of the new.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from torch_getfuse.backend.capture.graph_values import Feature, Weight
from torch_getfuse.backend.rules.rule import Stored
from torch_getfuse.backend.rules.view_windows import Layout

Place = int | tuple[fx.Node, int]


@dataclass(frozen=True)
class _Write:
    """What took the place of a tensor.

    Attributes:
        base: the tensor that was made.
        through: the view that was written, of whose shape ``base`` is; ``None`` where it is one
            of several in ``base``.
        whole: that view is the tensor itself.
    """

    base: int
    through: Layout | None
    whole: bool

    def shows(self, layout: Layout) -> Layout:
        """A view of the old tensor as one of the new."""
        if layout == self.through:
            return Layout.of(layout.shape)
        return layout if self.whole else Layout.opaque(layout.shape)


@dataclass
class Memory:
    """Which tensor each value shows by now."""

    _writes: dict[Place, _Write] = field(default_factory=dict)
    _joined: dict[Place, dict[fx.Node, Stored]] = field(default_factory=dict)

    def write(self, over: Feature | Weight, base: int, *, whole: bool, alone: bool = True) -> None:
        """``base`` takes the place of what ``over`` shows a view of.

        Args:
            over: what is written, as it is by now.
            whole: ``base`` has the shape of the old tensor itself, else that of ``over``.
            alone: ``False`` where ``base`` holds several tensors.
        """
        through = over.layout if alone and not whole else None
        self._writes[place_of(over)] = _Write(base, through, alone and whole)

    def join(self, constant: Weight, parts: Mapping[fx.Node, Stored]) -> None:
        """Weights that are written into a constant are behind it from now on."""
        self._joined.setdefault(constant.root, {}).update(parts)

    def current(self, value: Feature | Weight) -> Feature | Weight:
        """What a value is after the writes so far."""
        place, layout = place_of(value), value.layout
        while (write := self._writes.get(place)) is not None:
            place, layout = write.base, write.shows(layout)
        if isinstance(place, int):
            return Feature(place, layout)
        assert isinstance(value, Weight)
        joined = self._joined.get(place)
        return value if joined is None else replace(value, parts={**value.parts, **joined})


def place_of(value: Feature | Weight) -> Place:
    """The tensor that a value is a view of: a base, or the root of a constant."""
    return value.base if isinstance(value, Feature) else value.root
