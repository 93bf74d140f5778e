"""Groups as the columns of a linear program: the blocks that they contain, and their cost."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import OptimizeResult, linprog
from scipy.sparse import csc_matrix, csr_matrix, vstack

from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.relaxation import FINE, Undercutting
from torch_getfuse.partition.work import Work

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


_GROUP, _PROGRAM, _ENTRIES = 20, 2_000, 350
"""Steps counted for a new group and for a linear program; entries of the matrix for which each of
its iterations counts one step more."""


class Columns:
    """Turns masks of many groups into columns at once, and caches them.

    Args:
        problem: the problem; its blocks are the rows.

    Attributes:
        weights: weights of each block, in bytes; every plan moves them once.
        step: every plan moves the weights and a multiple of so many bytes.
    """

    def __init__(self, problem: FusionProblem) -> None:
        self.problem = problem
        self._bytes = -(-len(problem.graph) // 8)
        leaders = [(block & -block).bit_length() - 1 for block in problem.blocks]
        self._row = np.full(len(problem.graph), -1)
        self._row[leaders] = np.arange(len(leaders))
        graph, scheme = problem.graph, problem.evaluator.scheme
        self._lbdf = isinstance(scheme, Lbdf)
        number = {name: k for k, name in enumerate(graph.tensors)}
        self._sizes = np.array(list(graph.tensor_bytes.values()), np.int64)
        self._weights = np.array(scheme.weights, np.int64)
        self._kept = np.array([name in graph.outputs for name in graph.tensors])
        pairs = {(i, number[read.tensor]) for i, op in enumerate(graph.ops) for read in op.reads}
        shape = (len(graph), len(number))
        readers, read = np.array(sorted(pairs)).reshape(-1, 2).T
        self._reads = csr_matrix((np.ones(len(read), np.int64), (readers, read)), shape)
        written = [number[op.writes] for op in graph.ops]
        ones = np.ones(len(written), np.int64)
        self._writes = csr_matrix((ones, (np.arange(len(written)), written)), shape)
        self._readers = np.asarray(self._reads.sum(axis=0)).ravel()
        inside = [self._weights[list(bits(block))].sum() for block in problem.blocks]
        self.weights = np.array(inside, np.int64)
        again = scheme.weights if problem.rereads else ()  # of some groups, several times
        self.step = math.gcd(*graph.tensor_bytes.values(), *again)
        self._number: dict[int, int] = {}  # of each group seen, its row in _rows
        self._rows = csr_matrix((0, len(leaders)))
        self._costs = np.zeros(0, np.int64)

    def bound(self, level: int) -> int:
        """The least bytes that a plan can move of which ``level``, 1/FINE bytes, is proved."""
        base = int(self.weights.sum())
        return base - (base * FINE - level) // (FINE * self.step) * self.step

    def _numbers(self, groups: Sequence[int]) -> Ints:
        """Numbers of the groups; rows and costs of new ones are computed."""
        number = self._number
        if fresh := [group for group in dict.fromkeys(groups) if group not in number]:
            self.problem.evaluator.work.add(_GROUP * len(fresh))
            number.update(zip(fresh, range(len(number), len(number) + len(fresh)), strict=True))
            members = self._members(fresh)
            rows = self._row[members.indices]
            starts = np.concatenate([[0], np.cumsum(rows >= 0)])[members.indptr]
            rows = rows[rows >= 0]
            shape = (len(fresh), self._rows.shape[1])
            added = csr_matrix((np.ones(len(rows)), rows, starts), shape)
            self._rows = vstack([self._rows, added], "csr")
            self._costs = np.concatenate([self._costs, self._priced(fresh, members)])
        return np.fromiter((number[group] for group in groups), np.int64, len(groups))

    def _members(self, groups: Sequence[int]) -> csr_matrix:
        """Incidence of groups (rows) and operators (columns)."""
        raw = b"".join(group.to_bytes(self._bytes, "little") for group in groups)
        flags = np.frombuffer(raw, np.uint8).reshape(len(groups), self._bytes)
        row, column = np.nonzero(np.unpackbits(flags, axis=1, bitorder="little"))
        starts = np.searchsorted(row, np.arange(len(groups) + 1))
        ones = np.ones(len(column), np.int64)
        return csr_matrix((ones, column, starts), (len(groups), len(self._weights)))

    def _priced(self, groups: Sequence[int], members: csr_matrix) -> Ints:
        if not self._lbdf:
            return np.array([self.problem.evaluator.dram(group) for group in groups], np.int64)
        used, produced = members @ self._reads, members @ self._writes
        inner = used.multiply(produced).tocsr()  # per tensor written in a group: its readers in it
        read = used.astype(bool).astype(np.int64) - inner.astype(bool).astype(np.int64)
        # Not written to DRAM: tensors with all readers inside, unless they are outputs.
        inner.data = (inner.data == self._readers[inner.indices]) & ~self._kept[inner.indices]
        wanted = np.where(self._kept | (self._readers > 0), self._sizes, 0)
        written = produced @ wanted - inner.astype(np.int64) @ self._sizes
        return np.asarray(members @ self._weights + read @ self._sizes + written, np.int64)

    def learn(self, found: Sequence[Undercutting]) -> bool:
        """What an oracle found says nothing that is not known."""
        return False

    def matrix(self, groups: Sequence[int]) -> csc_matrix:
        """Incidence of blocks (rows) and groups (columns)."""
        numbers = self._numbers(groups)
        return self._rows[numbers].T.tocsc()

    def costs(self, groups: Sequence[int]) -> Ints:
        """``F_D`` of each group in bytes."""
        numbers = self._numbers(groups)
        return self._costs[numbers]

    def reduced(self, groups: Sequence[int], prices: npt.NDArray[np.number]) -> Floats:
        """Reduced cost of each group: ``F_D`` minus its blocks' prices, all in 1/FINE bytes."""
        reduced: Floats = self.costs(groups) * FINE - self.matrix(groups).T @ prices
        return reduced


class FoundColumns(Columns):
    """Columns of sets that need not be legal: they cost what an oracle said of them, the least."""

    def __init__(self, problem: FusionProblem) -> None:
        super().__init__(problem)
        self._found: dict[int, int] = {}

    def learn(self, found: Sequence[Undercutting]) -> bool:
        """Take the costs of sets from what an oracle found; whether a known one is cheaper now."""
        cheaper = False
        for each in found:
            cost = self._found[each.mask] = min(each.cost, self._found.get(each.mask, each.cost))
            number = self._number.get(each.mask)
            if number is not None and cost < self._costs[number]:
                self._costs[number] = cost
                cheaper = True
        return cheaper

    def _priced(self, groups: Sequence[int], members: csr_matrix) -> Ints:
        dram, found = self.problem.evaluator.dram, self._found
        costs = [found[group] if group in found else dram(group) for group in groups]
        return np.array(costs, np.int64)


def minimum(
    costs: Ints | Floats,
    matrix: csc_matrix | csr_matrix,
    sizes: Floats,
    work: Work,
    homes: csr_matrix | None = None,
    most: Ints | None = None,
) -> OptimizeResult | None:
    """The linear program over columns, solved in floating point; ``None`` without a solution.

    HiGHS satisfies rows, bounds and reduced costs only to 1e-7, and may fail where sizes differ by
    many orders of magnitude. So nothing is concluded from its numbers: duals are prices to try, in
    integers, and column values say which columns to try first.

    Args:
        costs: cost of each column.
        matrix: the rows to cover exactly.
        sizes: how often to cover each of them.
        work: counts and limits the iterations.
        homes: rows covered at most once, or ``most`` times.
        most: how often.

    Raises:
        OutOfWork: if a limit of ``work`` is reached.
    """
    work.add(_PROGRAM)
    entries = matrix.nnz + (0 if homes is None else homes.nnz) + len(sizes)
    steps = 1 + entries // _ENTRIES
    options = _limits(work, steps)
    result = solved(
        work,
        linprog,
        costs,
        A_ub=homes,
        b_ub=None if homes is None else np.ones(homes.shape[0]) if most is None else most,
        A_eq=matrix,
        b_eq=sizes,
        bounds=(0, None),
        method="highs-ds",
        # Presolving takes longer than solving.
        options={"presolve": False, **options},
    )
    if result.status == 1:
        work.give_up(by_clock=result.nit < options["maxiter"])
    work.add(steps * int(result.nit))
    usable = result.status == 0 and np.isfinite(result.x).all()
    return result if usable and np.isfinite(result.eqlin.marginals).all() else None


def _limits(work: Work, steps: int) -> dict[str, float]:
    """HiGHS's options for the limits of ``work``, of which an iteration is so many steps."""
    if work.steps_left == math.inf:
        return {}
    return {"maxiter": int(work.steps_left // steps), "time_limit": work.wall_left}


def solved(
    work: Work, solver: Callable[..., OptimizeResult], *args: Any, **named: Any
) -> OptimizeResult:
    """Run a HiGHS solver in a separate thread, as signals are not handled while it runs.

    After a ``KeyboardInterrupt`` it continues there, up to its limits. ``work`` counts its time.
    """
    if threading.current_thread() is not threading.main_thread():
        return solver(*args, **named)
    outcome: list[OptimizeResult | BaseException] = []
    seconds = 0.0

    def run() -> None:
        nonlocal seconds
        try:
            outcome.append(solver(*args, **named))
        except BaseException as error:  # raised again below, whatever it is
            outcome.append(error)
        seconds = time.thread_time()

    thread = threading.Thread(target=run, name="torch_getfuse-highs", daemon=True)
    thread.start()
    thread.join()
    work.add_time(seconds)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
