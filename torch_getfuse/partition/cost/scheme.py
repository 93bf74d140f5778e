"""What a fusion group costs: named terms, DRAM access, and the memo that searches ask.

A :class:`FusionScheme` is a cost model of one graph (LBDF, BRR, or one of a user's own). It answers
with two integers per group, ``F_b`` (buffer bytes) and ``F_D`` (DRAM bytes), and on request with
the named terms that add up to them. Searches never call a scheme directly: an :class:`Evaluator`
holds the buffer size and remembers every group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.pins import NONE, Pins
from torch_getfuse.partition.work import Work
from torch_getfuse.widths import Width, packed

_MOST_REMEMBERED = 1 << 14
_LARGEST_BUFFER = 1 << 50  # a petabyte: what does not fit it fits nothing

_QUESTION, _DRAM, _GROWN = 4, 4, 60
"""Steps that a question counts, and each operator whose traffic is added up; and what counts as so
many operators more where a group has grown from a part that is known."""

NO_CHOICE = "line"
"""The granularity that is recorded of a scheme that has no choice."""


@dataclass(frozen=True, slots=True)
class CostTerm:
    """One named share of a group's buffer.

    Attributes:
        kind: ``"weights"``, ``"lines"`` (``"pixels"``), or a scheme's own word.
        name: the operator or tensor it belongs to.
        units: how many units are held (rows of a map, weight elements).
        unit_bytes: bytes of one unit.
    """

    kind: str
    name: str
    units: int
    unit_bytes: int

    @property
    def bytes(self) -> int:
        """``units * unit_bytes``."""
        return self.units * self.unit_bytes


class Dram(NamedTuple):
    """DRAM access of a group per sample, in bytes (docs/method.md, section 3, ``F_D``)."""

    read: int
    write: int
    weight: int

    @property
    def total(self) -> int:
        """Features and weights together."""
        return self.read + self.write + self.weight


class Steps(NamedTuple):
    """What a question counts as work, for each operator of the group (``partition/work.py``).

    Attributes:
        buffer: in :meth:`FusionScheme.buffer`.
        joining: in :meth:`FusionScheme.hopeless`, of those that joined the part.
        whole: there, of all operators, if no part of the group is known.
        grown: there, of all operators and some more, if one is.
    """

    buffer: int
    joining: int
    whole: int
    grown: float


class TileRows(NamedTuple):
    """Rows of operators' outputs that the tiles of a group hold together, in bytes.

    With ``S`` and ``s`` their sums over a group of which several operators have weights, and
    weights that exceed the buffer ``B``, these are read at least ``ceil(S / (B + s))`` times.

    Attributes:
        least: per operator, at least.
        short: per operator, by which a tile may hold less than its share.
        pairs: (operator, one that runs later, bytes more if both are in the group); an operator
            stands in one of them at most.
    """

    least: Sequence[int]
    short: Sequence[int]
    pairs: Sequence[tuple[int, int, int]]


class FusionScheme(ABC):
    """A buffer-aware cost model of one graph: subclass it for one of your own.

    :meth:`buffer` is all that a subclass has to give; :meth:`dram` is right for schemes that move
    what crosses a group's border once and read again what :meth:`reread` says. The flags say what
    the planner may rely on. None is promised at first: what a scheme does not promise is not used,
    and a stage of the plan says so. ``docs/extending/cost-model.md`` has an example.

    A set of operators is a bit mask over ``graph.ops`` (:func:`~torch_getfuse.bits`). All sizes
    are integer bytes per sample. Answers must depend on the arguments alone, for they are
    remembered.

    Args:
        graph: whose groups it prices.
        activation_bytes: of one element of a feature map; ``None``: each tensor at the width that
            it is stored in.
        weight_bytes: of one weight element; ``None``: each at the width that it is stored in; 0:
            weights that cost neither DRAM access nor buffer.

    Sizes of tensors are asked of :attr:`graph`, which has them in the width asked for
    (``tensor_bytes``, ``row_bytes``, ``pixel_bytes``): an element need not be a whole byte, and
    channels may be padded.

    A scheme with :attr:`granularities` takes the keyword ``granularity`` as well.

    Attributes:
        name: what people type, and what plan files say; without it, that of the class.
        granularities: units in which it can stream, the default first; empty: it has no choice.
        additive: ``F_D`` of a group is a sum over tensors and weights, whatever else it holds: the
            bytes of each distinct tensor that it reads from outside, and of each that it produces
            and that is needed outside (``graph.tensor_bytes``), its :attr:`weights`, and
            :meth:`reread`. The exact searches and every lower bound add
            traffic up so and never ask :meth:`dram`; what they believe is compared with it when a
            plan is recorded. Where this is ``False``, plans are searched but nothing is proved of
            them.
        monotone: a group that grows downstream never needs less buffer. Then a group that does not
            fit is given up with all that contain it.
        floor_only_grows: what is :meth:`hopeless`, a convex set, stays so also where operators join
            that it depends on.
        merges_in_place: some optimum keeps an operator that writes over its input with its
            producer, so that they are moved as one.
        starts_in_place: it may not where the operator's reader reads other tensors as well: a group
            that starts with the operator can then be cheaper than without it, its producer's group
            is so neither with it nor without, and one such operator for each reader is enough.
        sequential: plans are sequences of steps that include the unfusable operators, and tensors
            may stay on chip between them (``partition/steps``); the scheme takes the keyword
            ``slice_channels``.
        holds_weights: the weights of a group stay on chip.
        has_predictor: weights of a validity predictor and of explainers that ask it come with this
            package.
        has_cover: the program for graphs that are too wide for the exact search can price its
            groups (``partition/wide``).
        row_granularity: the granularity in which the depth-first executor runs its plans
            (``docs/depth-first.md``); ``None``: in none.
        steps: what questions count as work.
        extra_steps: what all questions have counted so far beyond that, where some groups take far
            longer than others of their size.
        tile_rows: where a group can read its weights once for each of several tiles, what all
            tiles together hold at least. ``None``: nothing is promised.
        granularity: the unit of this one's streams.
        graph: with its tensors stored as asked for.
        activation_bytes: of an element of every tensor; ``None`` where widths differ.
        weights: bytes of the weights of each operator (:func:`weights_of`).
    """

    name: str
    granularities: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool] = False
    monotone: ClassVar[bool] = False
    floor_only_grows: ClassVar[bool] = False
    merges_in_place: ClassVar[bool] = False
    starts_in_place: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    holds_weights: ClassVar[bool] = False
    has_predictor: ClassVar[bool] = False
    has_cover: ClassVar[bool] = False
    row_granularity: ClassVar[str | None] = None
    steps: ClassVar[Steps] = Steps(14, 4, 10, 10)

    graph: OpGraph
    activation_bytes: Width | None
    weight_bytes: Width | None
    weights: Sequence[int]
    tile_rows: TileRows | None = None
    granularity: str = NO_CHOICE
    extra_steps: int = 0

    def __init__(
        self, graph: OpGraph, activation_bytes: Width | None = 1, weight_bytes: Width | None = 1
    ) -> None:
        self.graph = graph.stored_as(activation_bytes)
        self.activation_bytes = self.graph.activation_width
        self.weight_bytes = weight_bytes
        self.weights = weights_of(graph, weight_bytes)

    @abstractmethod
    def buffer(self, mask: int, buffer_bytes: int) -> int | None:
        """``F_b`` in bytes; ``None`` where the scheme is not defined for the group.

        A scheme may choose between several ways to run the group by the buffer it is given. A
        group is valid if ``F_b < buffer_bytes``, strictly.
        """

    def buffer_below(self, mask: int, buffer_bytes: int) -> int | None:
        """:meth:`buffer` if the group is valid; any number of at least ``buffer_bytes`` may stand
        for one that is not, where that takes less time.
        """
        return self.buffer(mask, buffer_bytes)

    def terms(self, mask: int, buffer_bytes: int) -> tuple[CostTerm, ...]:
        """The terms that add up to :meth:`buffer`, for reports; empty where that is ``None``.

        Without a subclass's own: one for the whole group.
        """
        need = self.buffer(mask, buffer_bytes)
        first = self.graph.ops[(mask & -mask).bit_length() - 1].name
        return () if need is None else (CostTerm("buffer", f"from {first} on", need, 1),)

    def hopeless(self, mask: int, buffer_bytes: int, part: int = 0) -> bool:
        """Whether ``F_b >= B`` is certain for every group that contains ``mask`` and, of the
        operators outside it, none that a member of ``mask`` depends on.

        ``part``: convex, and no member of it depends on one outside it. If this was asked of it
        before, the answer is found from what joined it; it is the same either way.

        Without a subclass's own: whether ``mask`` itself does not fit, if the scheme is
        :attr:`monotone`; else nothing is certain.
        """
        if not self.monotone:
            return False
        need = self.buffer(mask, buffer_bytes)
        return need is None or need >= buffer_bytes

    def reread(self, mask: int, buffer_bytes: int) -> int:
        """Bytes of weights or inputs that a valid group reads again, beyond the first time.

        None without a subclass's own.
        """
        return 0

    def least_reread(self, mask: int, buffer_bytes: int, part: int = 0) -> int:
        """A lower bound of :meth:`reread` of the groups of which :meth:`hopeless` speaks.

        ``part``: as there. None is certain without a subclass's own.
        """
        return 0

    def dram(self, mask: int, buffer_bytes: int) -> Dram:
        """``F_D`` of a valid group.

        Without a subclass's own: what crosses its border once, the weights once, and what
        :meth:`reread` says, as weights.
        """
        read, write, weight = once(self, mask)
        return Dram(read, write, weight + self.reread(mask, buffer_bytes))


def weights_of(graph: OpGraph, weight_bytes: Width | None) -> list[int]:
    """Bytes of the weights of each operator.

    Args:
        weight_bytes: of one element; ``None`` for the widths that the weights are stored in.
    """
    if weight_bytes is None:
        return [graph.stored_bytes(op) for op in graph.ops]
    return [packed(op.weight_elements, weight_bytes) for op in graph.ops]


def boundary(graph: OpGraph, mask: int) -> tuple[list[str], list[str]]:
    """Tensors that a group reads from outside, and those it produces that are needed outside."""
    reads: dict[str, None] = {}
    writes = []
    for i in bits(mask):
        op = graph.ops[i]
        for read in op.reads:
            if not mask >> graph.producer.get(read.tensor, len(graph)) & 1:
                reads[read.tensor] = None
        if op.writes in graph.outputs or graph.readers[i] & ~mask:
            writes.append(op.writes)
    return list(reads), writes


def once(scheme: FusionScheme, mask: int) -> Dram:
    """Everything at the border of a set read or written once, and its weights read once.

    The least that any method moves that runs the set at once, whether or not it fits the buffer.
    """
    size = scheme.graph.tensor_bytes
    reads, writes = boundary(scheme.graph, mask)
    return Dram(
        sum(size[name] for name in reads),
        sum(size[name] for name in writes),
        sum(scheme.weights[i] for i in bits(mask)),
    )


def smallest_buffer(scheme: FusionScheme, mask: int, buffer_bytes: int) -> int | None:
    """The smallest buffer in bytes under which a set of operators is a valid group.

    Args:
        buffer_bytes: where the search starts.

    Returns:
        ``None`` where the scheme has no schedule for the set at any size.
    """

    def fits(size: int) -> bool:
        need = scheme.buffer(mask, size)
        return need is not None and need < size

    need = scheme.buffer(mask, buffer_bytes)
    if need is not None and fits(need + 1) and not fits(need):
        return need + 1  # as where the demand is the same in every buffer
    low, high = 0, buffer_bytes
    while not fits(high):
        if high > _LARGEST_BUFFER:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


Key = TypeVar("Key")
Value = TypeVar("Value")


def remember(memo: dict[Key, Value], mask: Key, value: Value) -> Value:
    """File what is known of a set that a search may grow, and forget all when it gets too much.

    A search looks at sets near each other, but a mask is as long as its graph: memos of every set
    that was ever looked at would grow with the square of a graph's depth.
    """
    if len(memo) >= _MOST_REMEMBERED:
        memo.clear()
    memo[mask] = value
    return value


def counted(
    scheme: FusionScheme, work: Work, question: Callable[..., Value], *args: object
) -> Value:
    """The answer to a question, and what the cost model counts for it as extra steps.

    Raises:
        OutOfWork: inside a limit of ``work``.
    """
    before = scheme.extra_steps
    answer = question(*args)
    if extra := scheme.extra_steps - before:
        work.add(extra)
    return answer


class Evaluator:
    """A scheme under one buffer size: validity and cost of groups, each computed once.

    Args:
        scheme: the cost model.
        buffer_bytes: the on-chip buffer ``B``; a group is valid if ``F_b < B``, strictly.
        work: what counts the steps of all that is asked; its own without.
        pins: what groups must hold together or apart; a group that does not is not valid.

    Whatever is worked out counts steps, so each question may raise
    :class:`~torch_getfuse.partition.work.OutOfWork` inside a limit of ``work``.
    """

    def __init__(
        self,
        scheme: FusionScheme,
        buffer_bytes: int,
        work: Work | None = None,
        pins: Pins = NONE,
    ) -> None:
        self.scheme = scheme
        self.work = work or Work()
        self.pins = pins
        self._pinned = bool(pins)
        self._each, *self._floor = scheme.steps
        self.graph = scheme.graph
        self.buffer_bytes = buffer_bytes
        self._buffer: dict[int, int | None] = {}
        self._over: set[int] = set()  # groups of which no more is known than that they do not fit
        self._dram: dict[int, int] = {}
        self._hopeless: dict[int, bool] = {}

    @property
    def evaluated(self) -> int:
        """Distinct groups whose buffer was asked for."""
        return len(self._buffer) + len(self._over)

    def buffer(self, mask: int) -> int | None:
        """``F_b`` in bytes, ``None`` where undefined."""
        try:
            return self._buffer[mask]
        except KeyError:
            self._over.discard(mask)
            return self._ask(mask, self.scheme.buffer)

    def _ask(
        self, mask: int, question: Callable[[int, int], int | None], below: bool = False
    ) -> int | None:
        """The answer, which is remembered; ``below``: as more than that it is too large is not."""
        self.work.add(_QUESTION + self._each * mask.bit_count())
        before = self.scheme.extra_steps
        found = question(mask, self.buffer_bytes)
        if below and found is not None and found >= self.buffer_bytes:
            self._over.add(mask)
        else:
            self._buffer[mask] = found
        self.work.add(self.scheme.extra_steps - before)  # once it is known: it is remembered
        return found

    def valid(self, mask: int) -> bool:
        """``F_b(group) < B``, and the group keeps to the pins."""
        return (not self._pinned or self.pins.allow(mask)) and self.fits(mask)

    def fits(self, mask: int) -> bool:
        """``F_b(group) < B``, whatever is pinned.

        The floor is asked first: it is cheap, and settles most large groups.
        """
        if mask in self._buffer:
            found = self._buffer[mask]
        elif mask in self._over or self._beyond(mask):
            return False
        else:
            found = self._ask(mask, self.scheme.buffer_below, below=True)
        return found is not None and found < self.buffer_bytes

    def dram(self, mask: int) -> int:
        """``F_D`` of a valid group in bytes."""
        try:
            return self._dram[mask]
        except KeyError:
            self.work.add(_QUESTION + _DRAM * mask.bit_count())
            found = self._dram[mask] = self.scheme.dram(mask, self.buffer_bytes).total
            return found

    def hopeless(self, mask: int, part: int = 0) -> bool:
        """Whether no group grown from ``mask`` downstream can be valid.

        ``part``: what ``mask`` was grown from, see :meth:`FusionScheme.hopeless`.
        """
        return (self._pinned and self.pins.torn(mask)) or self._beyond(mask, part)

    def _beyond(self, mask: int, part: int = 0) -> bool:
        """The same by the cost model alone."""
        found = self._hopeless.get(mask)
        if found is not None:
            return found
        joining, each, grown = self._floor
        steps: float = _QUESTION + joining * (mask & ~part).bit_count()
        if each:
            members = mask.bit_count()
            steps += grown * (_GROWN + members) if part else each * members
        self.work.add(int(steps))
        scheme = self.scheme
        found = counted(scheme, self.work, scheme.hopeless, mask, self.buffer_bytes, part)
        return remember(self._hopeless, mask, found)

    def reread(self, mask: int) -> int:
        """Bytes that a valid group reads again; see :meth:`FusionScheme.reread`."""
        return self.scheme.reread(mask, self.buffer_bytes)

    def least_reread(self, mask: int, part: int = 0) -> int:
        """A lower bound of :meth:`reread` of every valid group grown from ``mask`` downstream."""
        scheme = self.scheme
        return counted(scheme, self.work, scheme.least_reread, mask, self.buffer_bytes, part)

    def unfusable(self) -> int:
        """Mask of the operators that alone do not fit (docs/method.md, section 1)."""
        return sum(1 << i for i in range(len(self.graph)) if not self.fits(1 << i))
