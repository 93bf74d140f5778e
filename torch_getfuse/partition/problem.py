"""What a search is given and what it gives back; algorithms and repairs are elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import NamedTuple, Protocol

from torch_getfuse.accelerator import format_size
from torch_getfuse.errors import GetfuseError, OptionError
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import (
    Neighbours,
    ancestors,
    bits,
    components,
    descendants,
    is_connected,
    mask_of,
    neighbours,
    topological_order,
)
from torch_getfuse.partition.pins import Pins, Whole
from torch_getfuse.partition.work import INTERRUPTED


class Crossing(NamedTuple):
    """A tensor as what crosses the border of groups.

    Attributes:
        maker, readers: masks of the fusable operators that write it (0: an input, or what an
            unfusable operator wrote) and read it.
        touched: both.
        size: in bytes.
        forced: whether it must be written whoever reads it: an output, or an unfusable reader.
    """

    maker: int
    readers: int
    touched: int
    size: int
    forced: bool

    def moved(self, group: int) -> int:
        """Bytes of it that a group moves to or from DRAM."""
        if self.maker & group:
            return self.size if self.forced or self.readers & ~group else 0
        return self.size if self.readers & group else 0

    def owed(self, left: int) -> int:
        """Bytes of it that every plan of the operators ``left`` moves, a set closed downstream."""
        if self.maker & left:
            return self.size if self.forced else 0
        return self.size if self.readers & left else 0


class FusionProblem:
    """Find the legal plan of a graph with the least DRAM access under one buffer.

    Args:
        evaluator: cost model and buffer.
        merge: search over blocks of operators that some optimum keeps together (see
            :func:`merge_in_place`); ``False`` for single operators, the paper's protocol.

    Attributes:
        unfusable: mask of the operators that alone do not fit; they stand outside every group.
        blocks: masks of what is moved as one, in topological order.
        tight, leading: larger blocks, and mask of what a group may start with of them, while the
            rest of the block is in another group (:attr:`FusionScheme.starts_in_place`).
        unready: a pinned set that is no valid group by itself, while a larger one may be; the exact
            search alone can then find a plan. ``None`` where every block is a valid group.

    Raises:
        OptionError: for pins that no plan can keep to.
    """

    def __init__(self, evaluator: Evaluator, merge: bool = True) -> None:
        self.evaluator = evaluator
        self.graph: OpGraph = evaluator.graph
        self.unfusable = evaluator.unfusable()
        everything = (1 << len(self.graph)) - 1
        self.fusable = everything & ~self.unfusable
        scheme = evaluator.scheme
        merge = merge and scheme.merges_in_place
        pins = evaluator.pins
        loose = beside_others(self.graph) if merge and scheme.starts_in_place else 0
        single = tuple(1 << i for i in bits(self.fusable))
        self.blocks = self.tight = single
        if merge:
            # Of a result that is written in any case, a group that starts with it writes it again
            # beside what its producer's group has to write for it.
            written = mask_of(
                i for i, op in enumerate(self.graph) if op.writes in self.graph.outputs
            )
            self.tight = merge_in_place(self.graph, self.unfusable, pins.loose | loose & written)
            self.blocks = merge_in_place(self.graph, self.unfusable, pins.loose | loose)
        firsts = mask_of((b & -b).bit_length() - 1 for b in self.tight)
        self.leading = loose & ~firsts & ~pins.in_wholes
        self.unready: Whole | None = None
        if pins.wholes:
            refuse_unfusable(self.graph, pins, self.unfusable)
            for whole in pins.wholes:
                if not (is_connected(whole.mask, self.near) and evaluator.fits(whole.mask)):
                    self.unready = whole
            self.blocks = contracted(self.graph, self.blocks, pins)

    @cached_property
    def near(self) -> Neighbours:
        """Per operator, its producers and consumers."""
        return neighbours(self.graph)

    @cached_property
    def above(self) -> tuple[int, ...]:
        """Per operator, everything that must run before it."""
        return ancestors(self.graph)

    @cached_property
    def below(self) -> tuple[int, ...]:
        """Per operator, everything that must run after it."""
        return descendants(self.graph)

    @cached_property
    def in_order(self) -> tuple[int, ...]:
        """Blocks and unfusable operators, in a topological order of both."""
        units = [*self.blocks, *(1 << i for i in bits(self.unfusable))]
        order = topological_order(units, self.graph)
        assert order is not None, "blocks wait for each other in no cycle"
        return tuple(units[k] for k in order)

    @cached_property
    def crossings(self) -> tuple[Crossing, ...]:
        """The tensors that a fusable operator reads or writes."""
        graph, size = self.graph, self.graph.tensor_bytes
        found = []
        for name in graph.tensors:
            everyone = mask_of(graph.consumers[name])
            maker = (1 << graph.producer[name] if name in graph.producer else 0) & self.fusable
            readers = everyone & self.fusable
            forced = name in graph.outputs or everyone != readers
            if maker | readers:
                found.append(Crossing(maker, readers, maker | readers, size[name], forced))
        return tuple(found)

    @cached_property
    def unavoidable(self) -> int:
        """Bytes that every plan moves: weights and inputs once in, outputs once out."""
        weights = sum(self.evaluator.scheme.weights[i] for i in bits(self.fusable))
        return weights + sum(crossing.owed(self.fusable) for crossing in self.crossings)

    @cached_property
    def rereads(self) -> bool:
        """Whether groups may read their weights again, as the cost model knows it."""
        if self.evaluator.scheme.tile_rows is not None:
            return True
        with self.evaluator.work.finishing():
            return self.evaluator.least_reread(self.fusable) > 0

    def parts(self, mask: int) -> list[int]:
        """Connected parts of whole blocks that make up a convex set and can run one after another.

        Its components, as long as only tensors order the operators. Two components may wait for
        each other where something else does (``Op.after``); such a set is cut in two at its
        middle block, as often as it takes. What comes before a block is closed under the order.
        """
        pieces = components(mask, self.near)
        if not self.graph.ordered or len(pieces) == 1:
            return pieces
        if topological_order(pieces, self.graph) is not None:
            return pieces
        blocks = [b for b in self.blocks if b & mask]
        lower = sum(blocks[: len(blocks) // 2])
        return self.parts(lower) + self.parts(mask & ~lower)

    def cost(self, groups: Sequence[int]) -> int:
        """``F_D`` sum of valid groups in bytes."""
        return sum(map(self.evaluator.dram, groups))

    def covers(self, groups: Sequence[int]) -> bool:
        """Whether every fusable operator stands in exactly one of the groups, and no other does."""
        covered = 0
        for group in groups:
            if not group or group & covered:
                return False
            covered |= group
        return covered == self.fusable

    def order(self, groups: Sequence[int]) -> tuple[int, ...] | None:
        """Groups that cover the graph, as they and the unfusable operators can run.

        ``None`` where they depend on each other in a cycle.
        """
        alone = [1 << i for i in bits(self.unfusable)]
        order = topological_order([*groups, *alone], self.graph)
        return None if order is None else tuple(groups[k] for k in order if k < len(groups))

    def legal(self, groups: Sequence[int]) -> bool:
        """Whether groups are a legal plan (docs/method.md, section 1)."""
        return (
            self.covers(groups)
            and all(is_connected(group, self.near) for group in groups)
            and all(map(self.evaluator.valid, groups))
            and self.order(groups) is not None
        )

    @cached_property
    def crossings_of(self) -> tuple[tuple[Crossing, ...], ...]:
        """Per operator, the tensors that it touches."""
        found: list[list[Crossing]] = [[] for _ in range(len(self.graph))]
        for crossing in self.crossings:
            for i in bits(crossing.touched):
                found[i].append(crossing)
        return tuple(map(tuple, found))

    def added_up(self, group: int) -> int:
        """``F_D`` of a valid group in bytes, as the exact searches believe it to be."""
        return self.evaluator.reread(group) + self.moved(group)

    def moved(self, group: int) -> int:
        """Bytes that a set moves which reads nothing again, whether it is a group or not."""
        moved = 0
        for i in bits(group):
            moved += self.evaluator.scheme.weights[i]
            for crossing in self.crossings_of[i]:
                inside = crossing.touched & group
                if inside & -inside == 1 << i:  # else counted at the first that touches it
                    moved += crossing.moved(group)
        return moved

    def check_additive(self, groups: Sequence[int]) -> None:
        """Compare what the exact searches believe of valid groups with what the scheme says.

        Raises:
            GetfuseError: names the first group in which they differ.
        """
        scheme = self.evaluator.scheme
        for group in groups if scheme.additive else ():
            believed, told = self.added_up(group), self.evaluator.dram(group)
            if believed != told:
                first = self.graph.ops[(group & -group).bit_length() - 1].name
                raise GetfuseError(
                    f"scheme {scheme.name!r} says that its DRAM access adds up by tensor "
                    f"(additive), but the group of {first} ({group.bit_count()} operators) moves "
                    f"{told} B by dram() and {believed} B added up; set additive = False, and "
                    "nothing is proved of its plans"
                )


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        groups: masks of the fusion groups in an order in which they can run.
        dram_bytes: their ``F_D`` sum.
        plans: plans evaluated (for the exact search and the split: groups).
        seconds: wall time.
        lower_bound_bytes: no legal plan has less; 0 where the method proves nothing.
        history: (plans evaluated, best ``F_D`` so far) whenever the best improved.
        stopped: why it ended early: ``""``, a limit on work, or ``"time limit"``.
    """

    groups: tuple[int, ...]
    dram_bytes: int
    plans: int
    seconds: float
    lower_bound_bytes: int = 0
    history: tuple[tuple[int, int], ...] = ()
    stopped: str = ""

    @property
    def proved(self) -> bool:
        """Whether no legal plan has less."""
        return self.lower_bound_bytes == self.dram_bytes


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C in a search that knows a plan by then.

    Attributes:
        result: the best so far.
    """

    def __init__(self, result: SearchResult) -> None:
        super().__init__(INTERRUPTED)
        self.result = result


class Repair(Protocol):
    """Turns an invalid group into valid ones."""

    @property
    def name(self) -> str:
        """For reports: ``"random"``, ``"saliency"``, ..."""
        ...

    def __call__(self, group: int, rng: Random) -> list[int] | None:
        """Valid connected groups that cover ``group`` and leave a plan acyclic, or ``None``.

        Every cut must be closed under the order (a down-set of the group, and the rest), so
        that splitting a group of an acyclic plan leaves it acyclic.
        """
        ...


class Search(Protocol):
    """A function that looks for a plan: what ``method=`` takes by name or as an object.

    :class:`~torch_getfuse.partition.search.run.Run` keeps its budget, its limits and the best plan.
    """

    def __call__(
        self,
        problem: FusionProblem,
        budget: int,
        seed: int,
        repair: Repair | None,
        time_limit: float | None,
        progress: Callable[[int, int], None] | None,
    ) -> SearchResult:
        """The best plan found.

        Args:
            problem: graph, cost model and buffer; groups are masks of whole blocks.
            budget: plans to evaluate at most.
            seed: of everything that is drawn: same seed, same plan.
            repair: splits an invalid group where an explainer says; ``None`` for
                ``explainer=None``.
            time_limit: seconds.
            progress: called with (plans evaluated, least ``F_D`` so far in bytes), or ``None``.

        Returns:
            Groups in an order in which they can run, and their ``F_D`` sum in bytes. The planner
            checks both. A lower bound is believed of the searches of this package alone.
        """
        ...


def blocks_and_ideals(graph: OpGraph, merged: Sequence[int]) -> tuple[list[int], list[int]]:
    """Per operator, mask of its block, and its ideal: the block, all that it depends on, and the
    blocks of those.

    Args:
        merged: masks of the blocks; an operator in none of them is one of its own.
    """
    blocks = [1 << i for i in range(len(graph))]
    for block in merged:
        for i in bits(block):
            blocks[i] = block
    ideals: list[int] = []
    for block in blocks:
        before = 0
        for j in bits(block):
            before |= graph.predecessors[j]
        ideal = block
        for j in bits(before & ~block):
            ideal |= ideals[j]
        ideals.append(ideal)
    return blocks, ideals


def merge_in_place(graph: OpGraph, unfusable: int, apart: int = 0) -> tuple[int, ...]:
    """Blocks of fusable operators that some optimal plan keeps together.

    An operator ``e`` that writes over its input joins its producer ``p`` if it has no weights,
    at most one consumer, both are fusable, none that is stands between them in the graph, and only
    tensors order either before others, or ``e`` after others. Lossless under LBDF: in a plan that
    separates them, move ``e`` into ``p``'s group. That group then streams out ``e``'s tensor
    instead of ``p``'s, which has the same size and shares its storage, and in the same turn, for
    results are made in the order of the graph. So its buffer and traffic stay. The
    group that ``e`` leaves reads the one tensor instead of the other and stays connected, for
    ``e`` touched it through its only consumer alone; a group of ``e`` alone disappears. No new
    dependence between groups arises. (With two consumers ``e`` may be what connects its group:
    not lossless.) For BRR see docs/exact-search.md, section 1.

    Args:
        graph, unfusable: of a problem.
        apart: operators that stay blocks of their own.
    """
    leader = list(range(len(graph)))
    waited_for = zip(graph.successors, graph.readers, strict=True)
    ordered = unfusable | mask_of(i for i, (after, read) in enumerate(waited_for) if after != read)
    for i, op in enumerate(graph.ops):
        before = graph.makers[i]
        between = ((1 << i) - 1) & ~((1 << before.bit_length()) - 1)
        if (
            before
            and graph.overwrites[i]
            and not between & ~unfusable
            and not op.weight_elements
            and not op.after
            and graph.readers[i].bit_count() <= 1
            and not (before | 1 << i) & ordered
            and not apart >> i & 1
        ):
            leader[i] = leader[before.bit_length() - 1]
    blocks: dict[int, int] = {}
    for i, first in enumerate(leader):
        if not unfusable >> i & 1:
            blocks[first] = blocks.get(first, 0) | 1 << i
    return tuple(blocks.values())


def contracted(graph: OpGraph, blocks: Sequence[int], pins: Pins) -> tuple[int, ...]:
    """Blocks in topological order, of which each pinned set is one (docs/method.md, section 13).

    A block that a set has a part of joins it: all of it runs after that part, and nothing between.
    """
    found = list(blocks)
    for whole in pins.wholes:
        apart = [block for block in found if not block & whole.mask]
        found = [*apart, mask_of(i for b in found if b & whole.mask for i in bits(b))]
    order = topological_order(found, graph)
    assert order is not None, "pinned sets that wait for each other are one set"
    return tuple(found[k] for k in order)


def refuse_unfusable(graph: OpGraph, pins: Pins, unfusable: int) -> None:
    """Raises :class:`OptionError` for a pinned set with an operator that stands in no group."""
    for whole in pins.wholes:
        if stuck := whole.mask & unfusable:
            name = graph.ops[stuck.bit_length() - 1].name
            raise OptionError(
                f"{whole.text} needs a group with {name}, which does not fit the buffer even "
                "alone; leave it out of the pin, or raise buffer="
            )


def too_big(whole: Whole, evaluator: Evaluator) -> str:
    """Why no group holds a pinned set, in numbers."""
    need, limit = evaluator.buffer(whole.mask), evaluator.buffer_bytes
    if need is None:
        return f"{whole.text}: scheme {evaluator.scheme.name!r} has no schedule for them together"
    terms = evaluator.scheme.terms(whole.mask, limit)
    weights = sum(term.bytes for term in terms if term.kind == "weights")
    held = f", {format_size(weights)} of it weights" if weights else ""
    count = whole.mask.bit_count()
    return (
        f"{whole.text} needs {format_size(need)} ({count} operators{held}), buffer "
        f"{format_size(limit)}; raise buffer= above that, or pin fewer operators"
    )


def beside_others(graph: OpGraph) -> int:
    """Mask of the operators that work in place and have a reader of other tensors as well."""
    return mask_of(
        i
        for i, op in enumerate(graph.ops)
        if graph.overwrites[i]
        and any(
            read.tensor != op.writes
            for reader in bits(graph.readers[i])
            for read in graph.ops[reader].reads
        )
    )
