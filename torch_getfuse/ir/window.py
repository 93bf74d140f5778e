"""Windows: which positions of an input an output position of an operator needs.

Fusion code knows operators by their windows only. No torch here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from torch_getfuse.errors import GraphError
from torch_getfuse.json_fields import Fields, as_scale
from torch_getfuse.limits import MOST_POSITIONS

Pair = tuple[int, int]


class WindowKind(str, enum.Enum):
    """How an output position picks input positions; closed on purpose."""

    IDENTITY = "identity"
    SLIDING = "sliding"
    TRANSPOSED = "transposed"
    RESIZE = "resize"
    REDUCE = "reduce"
    WHOLE = "whole"


def positions_needed(
    kernel: int, stride: int, dilation: int, padding: int, low: int, high: int
) -> Pair:
    """First position that outputs ``[low, high)`` of a sliding window need, and the one after the
    last; not clipped to the map.
    """
    start = low * stride - padding
    return start, start + (high - low - 1) * stride + dilation * (kernel - 1) + 1


def positions_added(
    kernel: int, stride: int, dilation: int, padding: int, low: int, high: int
) -> Pair:
    """The same of a transposed window: the positions that may add to those outputs."""
    start = -(-(low + padding - dilation * (kernel - 1)) // stride)
    return start, (high - 1 + padding) // stride + 1


def first_resized(position: int, size_in: int, size_out: int) -> int:
    """First of the two positions that an output of an interpolation needs.

    floor((position + 1/2) / f - 1/2) with f = size_out / size_in, in integers.
    """
    return max(0, ((2 * position + 1) * size_in - size_out) // (2 * size_out))


def size_slid(kernel: int, stride: int, dilation: int, padding: int, size_in: int) -> int:
    """Outputs of a sliding window; ``padding`` is that of both ends."""
    return (size_in + padding - dilation * (kernel - 1) - 1) // stride + 1


def size_transposed(kernel: int, stride: int, dilation: int, padding: int, size_in: int) -> int:
    """Outputs of a transposed window; ``padding`` is that of both ends."""
    return (size_in - 1) * stride - padding + dilation * (kernel - 1) + 1


@dataclass(frozen=True, slots=True)
class Window:
    """Which input positions an output position needs, per axis (rows, columns).

    docs/method.md, section 2. ``REDUCE`` and ``WHOLE`` need every position; the difference is that
    a reduction takes in each unit as it arrives and holds none.
    """

    kind: WindowKind
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: Pair = (0, 0)
    padding_end: Pair = (0, 0)
    scale: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def identity(cls) -> Window:
        return _IDENTITY

    @classmethod
    def reduce(cls) -> Window:
        return _REDUCE

    @classmethod
    def whole(cls) -> Window:
        return _WHOLE

    @classmethod
    def sliding(
        cls,
        kernel: Pair,
        stride: Pair = (1, 1),
        dilation: Pair = (1, 1),
        padding: Pair = (0, 0),
        padding_end: Pair | None = None,
    ) -> Window:
        """Convolution or pooling; a 1x1 window of stride 1 without padding is the identity."""
        end = padding if padding_end is None else padding_end
        if kernel == (1, 1) and stride == (1, 1) and padding == end == (0, 0):
            return _IDENTITY
        return cls(WindowKind.SLIDING, kernel, stride, dilation, padding, end)

    @classmethod
    def transposed(
        cls,
        kernel: Pair,
        stride: Pair = (1, 1),
        dilation: Pair = (1, 1),
        padding: Pair = (0, 0),
        padding_end: Pair | None = None,
    ) -> Window:
        """Transposed convolution; ``padding_end`` is the padding less the output padding."""
        end = padding if padding_end is None else padding_end
        return cls(WindowKind.TRANSPOSED, kernel, stride, dilation, padding, end)

    @classmethod
    def resize(cls, scale: tuple[float, float]) -> Window:
        """Interpolation: two neighbouring positions, found from the sizes of the two maps."""
        return cls(WindowKind.RESIZE, scale=scale)

    @property
    def everything(self) -> bool:
        """True where each output position needs every input position."""
        return self.kind in (WindowKind.REDUCE, WindowKind.WHOLE)

    def span(self, axis: int, position: int, size_in: int, size_out: int) -> Pair:
        """First and last input position that output ``position`` needs, clipped to the map.

        The last is before the first where the window lies in the padding alone.
        """
        kind = self.kind
        if kind is WindowKind.IDENTITY:
            return (0, 0) if size_in == 1 else (position, position)
        if kind is WindowKind.SLIDING:
            low, end = positions_needed(
                *self._taps(axis), self.padding[axis], position, position + 1
            )
            high = end - 1
        elif kind is WindowKind.TRANSPOSED:
            low, end = positions_added(
                *self._taps(axis), self.padding[axis], position, position + 1
            )
            high = end - 1
        elif kind is WindowKind.RESIZE:
            low = first_resized(position, size_in, size_out)
            high = low + 1
        else:
            low, high = 0, size_in - 1
        return max(0, low), min(high, size_in - 1)

    def output_size(self, axis: int, size_in: int) -> int | None:
        """Positions that the window implies for the output; ``None`` where it implies none."""
        ends = self.padding[axis] + self.padding_end[axis]
        if self.kind is WindowKind.SLIDING:
            return size_slid(*self._taps(axis), ends, size_in)
        if self.kind is WindowKind.TRANSPOSED:
            return size_transposed(*self._taps(axis), ends, size_in)
        return None

    def _taps(self, axis: int) -> tuple[int, int, int]:
        return self.kernel[axis], self.stride[axis], self.dilation[axis]

    def to_json(self) -> str | dict[str, Any]:
        """The form of plan.json (docs/plan-file.md)."""
        if self.kind in (WindowKind.IDENTITY, WindowKind.REDUCE, WindowKind.WHOLE):
            return str(self.kind.value)
        if self.kind is WindowKind.RESIZE:
            return {"scale": list(self.scale)}
        form: dict[str, Any] = {
            name: list(getattr(self, name)) for name in ("kernel", "stride", "dilation", "padding")
        }
        if self.padding_end != self.padding:
            form["padding_end"] = list(self.padding_end)
        if self.kind is WindowKind.TRANSPOSED:
            form["transposed"] = True
        return form

    @classmethod
    def from_json(cls, form: object) -> Window:
        """The inverse of :meth:`to_json`; raises :class:`GraphError` for any other form."""
        if isinstance(form, str) and form in ("identity", "reduce", "whole"):
            return cls(WindowKind(form))
        if isinstance(form, dict) and "scale" in form:
            scale = Fields(form, "window").items("scale")
            if len(scale) != 2:
                raise GraphError(f"window.scale is a list of {len(scale)}, not of two numbers")
            high, wide = (as_scale(value, "window.scale") for value in scale)
            return cls.resize((high, wide))
        if isinstance(form, dict) and "kernel" in form:
            fields = Fields(form, "window")
            parts = {name: fields.pair(name, 1) for name in ("kernel", "stride", "dilation")}
            parts["padding"] = fields.pair("padding", -MOST_POSITIONS)
            if "padding_end" in fields:
                parts["padding_end"] = fields.pair("padding_end", -MOST_POSITIONS)
            transposed = "transposed" in fields and fields.flag("transposed")
            return (cls.transposed if transposed else cls.sliding)(**parts)
        raise GraphError(
            f"window {ascii(form)[:60]} is not known: expected 'identity', 'reduce', 'whole', "
            "{'scale': [h, w]} or {'kernel': [h, w], 'stride': ..., 'dilation': ..., "
            "'padding': ...}"
        )

    def __str__(self) -> str:
        if self.kind is WindowKind.RESIZE:
            return f"resize x{self.scale[0]:g}"
        if self.kind not in (WindowKind.SLIDING, WindowKind.TRANSPOSED):
            return str(self.kind.value)
        text = "x".join(map(str, self.kernel))
        if self.stride != (1, 1):
            text += f" s{self.stride[0]}"
        if self.dilation != (1, 1):
            text += f" d{self.dilation[0]}"
        return text


_IDENTITY = Window(WindowKind.IDENTITY)
_REDUCE = Window(WindowKind.REDUCE)
_WHOLE = Window(WindowKind.WHOLE)
