"""The integer program: of given groups, those that cover each block once at the least cost.

Whole choices of legal groups may depend on each other in a cycle. Each cycle found is cut off, with
all choices that have it for the same reason, and the program solved again; each choice is also made
legal by splitting groups, for no time may be left. The integer program may find nothing in time, so
its linear relaxation is rounded first.

Both are solved in floating point, to tolerances: rows are covered to 1e-7 (the relaxation) or 1e-6
(the integer program), and shares are as far from 0 and 1. So two groups that share a block can both
have a share a little above a half. Solvers are therefore only asked what to try: which groups are
disjoint, whether they cover everything, and what they cost is worked out here, in integers, and an
answer that is no cover is not used.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from random import Random

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, vstack

from torch_getfuse import ordering
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.search.random_split import RandomSplit
from torch_getfuse.partition.wide.group_columns import Columns, limits, minimum, solved
from torch_getfuse.partition.work import OutOfWork

SURE = 0.8  # shares of the relaxation that are rounded up together
GAP = 1e-4  # share of the value at which the integer program may stop

_ROOT, _NODE = 50, 20  # steps per entry of the matrix, and entries for which a node counts one

Ints = npt.NDArray[np.int64]
Cycle = list[tuple[int, int, int]]  # groups as (mask, operator entered, operator left)


def choose(
    columns: Columns, groups: tuple[int, ...], known: SearchResult, seconds: float | None = None
) -> Generator[tuple[int, ...], None, None]:
    """Ever cheaper legal plans by some groups, each in an order in which it can run.

    Args:
        columns: of the problem whose blocks are to be covered.
        groups: legal ones, among them every block.
        known: a legal plan; all that is found is cheaper.
        seconds: for the solvers, counted as work first.
    """
    problem = columns.problem
    work = problem.evaluator.work
    least = problem.cost(known.groups)
    try:
        with work.within(seconds):
            for picked in _choices(columns, groups):
                with work.finishing():
                    legal = split_cycles(problem, picked)
                    cost = problem.cost(legal)
                    order = problem.order(legal)
                if order is not None and cost < least:
                    least = cost
                    yield order
    except OutOfWork:
        pass


def _choices(columns: Columns, groups: tuple[int, ...]) -> Iterator[list[int]]:
    """Covers by the groups, mostly of less and less cost: by rounding, then by integer programs.

    Raises:
        OutOfWork: where a limit on work is reached.
    """
    problem, work = columns.problem, columns.problem.evaluator.work
    matrix, costs = columns.matrix(groups), columns.costs(groups)
    rounded = _dive(columns, groups)
    if rounded is not None:
        yield rounded
    cuts: list[csr_matrix] = []
    most: list[int] = []
    while True:
        constraints = [LinearConstraint(matrix, 1, 1)]
        if cuts:
            constraints.append(LinearConstraint(vstack(cuts), -np.inf, np.array(most)))
        entries = matrix.nnz + sum(cut.nnz for cut in cuts)
        work.add(_ROOT * entries)
        node = 1 + entries // _NODE
        found = solved(
            milp,
            costs,
            constraints=constraints,
            integrality=np.ones(len(groups)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP, **limits(work, "node_limit", node)},
        )
        if found.x is None:
            if found.status == 1:
                work.give_up()
            return
        picked = [groups[k] for k in np.flatnonzero(found.x > 0.5)]
        if not problem.covers(picked):
            return
        yield picked
        if found.status == 1:
            work.give_up()
        work.add(node * int(found.mip_node_count))
        cycles = find_cycles(problem, picked)
        if not cycles:
            return
        for cycle in cycles:
            row, limit = _cut(groups, cycle)
            cuts.append(row)
            most.append(limit)


def _dive(columns: Columns, groups: tuple[int, ...]) -> list[int] | None:
    """A cover by rounding: most of the relaxation's large shares are set to 1, and again.

    ``None`` where the solver gives no answer before all is covered.
    """
    problem = columns.problem
    matrix, costs = columns.matrix(groups), columns.costs(groups)
    picked: list[int] = []
    alive = np.arange(len(groups))
    open_ = np.ones(matrix.shape[0], bool)
    by_row = matrix.tocsr()
    covered = 0
    while open_.any():
        sizes = np.ones(open_.sum())
        found = minimum(costs[alive], by_row[open_][:, alive], sizes, problem.evaluator.work)
        if found is None:
            return None
        large = alive[found.x > max(0.5, min(SURE, found.x.max() - 1e-6))]
        if not len(large):
            large = alive[[int(found.x.argmax())]]
        for k in large:
            # Shares above a half do not meet in a row, but for the solver's tolerance.
            if not groups[k] & covered:
                picked.append(groups[k])
                covered |= groups[k]
        open_ = np.array([not block & covered for block in problem.blocks])
        alive = np.array([k for k in alive if not groups[k] & covered], np.int64)
    return picked


def _cut(groups: Sequence[int], cycle: Cycle) -> tuple[csr_matrix, int]:
    """Not all of a cycle's dependences at once, whatever the groups that have them.

    Groups that contain the operators at which one group of the cycle is entered and left, and not
    those of another one, make the same cycle, if one of each is chosen.
    """
    pairs = [1 << entered | 1 << left for _, entered, left in cycle]
    columns = [
        k for k, group in enumerate(groups) if sum(pair & ~group == 0 for pair in pairs) == 1
    ]
    data = np.ones(len(columns)), ([0] * len(columns), columns)
    return csr_matrix(data, shape=(1, len(groups))), len(pairs) - 1


def find_cycles(problem: FusionProblem, groups: Sequence[int]) -> list[Cycle]:
    """For each group on a cycle of dependences a shortest one, without the unfusable operators."""
    nodes = [*groups, *(1 << i for i in bits(problem.unfusable))]
    home = {i: k for k, mask in enumerate(nodes) for i in bits(mask)}
    after: list[dict[int, tuple[int, int]]] = [{} for _ in nodes]
    for i, before in enumerate(problem.graph.predecessors):
        for j in bits(before):
            if home[i] != home[j]:
                after[home[j]].setdefault(home[i], (j, i))
    found: dict[tuple[int, ...], Cycle] = {}
    for start in sorted(k for component in ordering.cycles(after) for k in component):
        came: dict[int, int] = {}
        front = [start]
        while front and start not in came:
            following = []
            for k in front:
                for other in after[k]:
                    if other not in came:
                        came[other] = k
                        following.append(other)
            front = following
        way = [start]
        while came[way[-1]] != start:
            way.append(came[way[-1]])
        way = [start, *way[:0:-1]]
        cycle = []
        for k, node in enumerate(way):
            entered = after[way[k - 1]][node][1]
            left = after[node][way[(k + 1) % len(way)]][0]
            if node < len(groups):
                cycle.append((groups[node], entered, left))
        found.setdefault(tuple(sorted(group for group, _, _ in cycle)), cycle)
    return list(found.values())


def split_cycles(problem: FusionProblem, groups: Sequence[int]) -> tuple[int, ...]:
    """A legal plan from a cover by legal groups: as long as there is a cycle, a group is split.

    Some group of a cycle is left at an operator that does not depend on the one at which it is
    entered; else the operators themselves would form a cycle. What depends on the latter becomes
    a part of its own, and this cycle is gone.
    """
    plan = list(groups)
    split = RandomSplit(problem)
    rng = Random(0)
    while cycles := find_cycles(problem, plan):
        for cycle in cycles:
            if any(group not in plan for group, _, _ in cycle):
                continue  # split already
            options = []
            for group, entered, left in cycle:
                late = group & (problem.below[entered] | 1 << entered)
                if not late >> left & 1:
                    sides = problem.parts(late) + problem.parts(group & ~late)
                    parts = [part for side in sides for part in split(side, rng)]
                    options.append((problem.cost(parts) - problem.cost([group]), group, parts))
            _, group, parts = min(options)
            plan.remove(group)
            plan += parts
    return tuple(plan)
