"""The integer program: among candidate groups, those that cover each block once at least cost.

The groups of an integer solution may depend on each other in a cycle. A constraint excludes each
cycle found, with all solutions that contain it for the same reason, and the program is solved
again; each solution is also made legal by splitting groups, as no time may be left for another.
The integer program may find nothing in time, so its linear relaxation is rounded first.

Both are solved in floating point, to tolerances: rows are covered to 1e-7 (the relaxation) or 1e-6
(the integer program), and variables are off 0 and 1 by as much. So two groups that share a block
can both have a value slightly above a half. Solvers therefore only propose what to try: whether
groups are disjoint and cover everything, and their cost, is computed here, in integers; a solution
that is not a cover is discarded.
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

SURE = 0.8  # values of the relaxation above this are rounded up together
GAP = 1e-4  # relative gap at which the integer program may stop

_ROOT, _NODE = 50, 20  # steps per entry of the matrix; entries per step of a node

Ints = npt.NDArray[np.int64]
Cycle = list[tuple[int, int, int]]  # groups as (mask, operator entered, operator left)


def choose(
    columns: Columns, groups: tuple[int, ...], known: SearchResult, seconds: float | None = None
) -> Generator[tuple[int, ...], None, None]:
    """Yield cheaper and cheaper legal plans made of ``groups``, each in an executable order.

    Args:
        columns: columns of the problem whose blocks are to be covered.
        groups: legal groups, including every block.
        known: a legal plan; all plans yielded are cheaper.
        seconds: time limit, converted to counted work (``partition/work.py``).
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
    """Covers by the groups, mostly of falling cost: by rounding, then by integer programs.

    Raises:
        OutOfWork: if a limit on work is reached.
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
        result = solved(
            work,
            milp,
            costs,
            constraints=constraints,
            integrality=np.ones(len(groups)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP, **limits(work, "node_limit", node)},
        )
        if result.x is None:
            if result.status == 1:
                work.give_up()
            return
        picked = [groups[k] for k in np.flatnonzero(result.x > 0.5)]
        if not problem.covers(picked):
            return
        yield picked
        if result.status == 1:
            work.give_up()
        work.add(node * int(result.mip_node_count))
        cycles = find_cycles(problem, picked)
        if not cycles:
            return
        for cycle in cycles:
            row, limit = _cut(groups, cycle)
            cuts.append(row)
            most.append(limit)


def _dive(columns: Columns, groups: tuple[int, ...]) -> list[int] | None:
    """A cover by diving: round the large values of the relaxation up to 1, solve again, repeat.

    ``None`` if the solver fails before everything is covered.
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
        relaxed = minimum(costs[alive], by_row[open_][:, alive], sizes, problem.evaluator.work)
        if relaxed is None:
            return None
        large = alive[relaxed.x > max(0.5, min(SURE, relaxed.x.max() - 1e-6))]
        if not len(large):
            large = alive[[int(relaxed.x.argmax())]]
        for k in large:
            # At most one group per row is above a half, except for the solver's tolerance.
            if not groups[k] & covered:
                picked.append(groups[k])
                covered |= groups[k]
        open_ = np.array([not block & covered for block in problem.blocks])
        alive = np.array([k for k in alive if not groups[k] & covered], np.int64)
    return picked


def _cut(groups: Sequence[int], cycle: Cycle) -> tuple[csr_matrix, int]:
    """A constraint that excludes a cycle of dependences, by whichever groups it is formed.

    Choosing, for each group of the cycle, some group that contains the operators at which it is
    entered and left, and not those of another group of it, makes the same cycle.
    """
    pairs = [1 << entered | 1 << left for _, entered, left in cycle]
    columns = [
        k for k, group in enumerate(groups) if sum(pair & ~group == 0 for pair in pairs) == 1
    ]
    data = np.ones(len(columns)), ([0] * len(columns), columns)
    return csr_matrix(data, shape=(1, len(groups))), len(pairs) - 1


def find_cycles(problem: FusionProblem, groups: Sequence[int]) -> list[Cycle]:
    """A shortest cycle through each group that is on one, without the unfusable operators."""
    nodes = [*groups, *(1 << i for i in bits(problem.unfusable))]
    home = {i: k for k, mask in enumerate(nodes) for i in bits(mask)}
    after: list[dict[int, tuple[int, int]]] = [{} for _ in nodes]
    for i, before in enumerate(problem.graph.predecessors):
        for j in bits(before):
            if home[i] != home[j]:
                after[home[j]].setdefault(home[i], (j, i))
    cycles: dict[tuple[int, ...], Cycle] = {}
    for start in sorted(k for component in ordering.cycles(after) for k in component):
        predecessor: dict[int, int] = {}
        front = [start]
        while front and start not in predecessor:
            following = []
            for k in front:
                for other in after[k]:
                    if other not in predecessor:
                        predecessor[other] = k
                        following.append(other)
            front = following
        path = [start]
        while predecessor[path[-1]] != start:
            path.append(predecessor[path[-1]])
        path = [start, *path[:0:-1]]
        cycle = []
        for k, node in enumerate(path):
            entered = after[path[k - 1]][node][1]
            left = after[node][path[(k + 1) % len(path)]][0]
            if node < len(groups):
                cycle.append((groups[node], entered, left))
        cycles.setdefault(tuple(sorted(group for group, _, _ in cycle)), cycle)
    return list(cycles.values())


def split_cycles(problem: FusionProblem, groups: Sequence[int]) -> tuple[int, ...]:
    """A legal plan from a cover by legal groups: splits a group of each cycle until none is left.

    Some group of a cycle is left at an operator that does not depend on the one at which it is
    entered; otherwise the operators themselves would form a cycle. Splitting off everything that
    depends on the latter breaks the cycle.
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
