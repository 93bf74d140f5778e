"""Inequalities that all legal plans satisfy, and shares of sets, of a linear program, do not.

Each says ``sum a(S) x(S) <= b`` with whole numbers ``a(S) >= 0``. Of three blocks, at most one set
of a plan has two or more (a subset-row inequality: Jepsen, Petersen, Spoorendonk, Pisinger,
Operations Research 56(2), 2008). And the sets of a plan do not wait for each other in a cycle.
``docs/exact-search.md``, section 6, has the proofs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, hstack

from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.cycles import Cycle, find_cycles
from torch_getfuse.partition.work import Work

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

WHOLE = 1e-6  # shares so close to 0 or 1 are taken for whole
VIOLATED = 0.05  # by so much at least
AT_ONCE = 12  # inequalities of three blocks that are added at once
_MOST_ROWS = 120  # blocks with shares, of which three are looked for
_BLOCK, _PRODUCTS = 30, 300  # steps counted per such block, and products per further step
_ENTRIES = 700  # entries of the table of sets that are gone through, per step


class Cut(NamedTuple):
    """An inequality.

    Attributes:
        weights: ``a`` of each set.
        most: ``b``.
    """

    weights: Ints
    most: int


class Cuts:
    """Some inequalities over some sets.

    Attributes:
        matrix: ``a`` of each set (row) in each of them (column).
        most: ``b`` of each.
    """

    def __init__(self, sets: int) -> None:
        self.matrix = csr_matrix((sets, 0), dtype=np.int64)
        self.most = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.most)

    def add(self, cuts: Sequence[Cut]) -> bool:
        """Add some; whether there are any."""
        if not cuts:
            return False
        columns = [csr_matrix(cut.weights[:, None]) for cut in cuts]
        self.matrix = hstack([self.matrix, *columns], "csr")
        self.most = np.append(self.most, [cut.most for cut in cuts])
        return True


def of_three_blocks(rows: csr_matrix, used: Ints, shares: Floats, work: Work) -> Iterator[Cut]:
    """Inequalities that shares violate most, of three blocks each.

    Args:
        rows: the blocks (columns) of all sets (rows).
        used: the sets that have shares.
        shares: theirs.
        work: counts what it takes.
    """
    halves = (shares > WHOLE) & (shares < 1 - WHOLE)
    has = rows[used[halves]].toarray().astype(bool)
    # Blocks that the same sets have are one.
    blocks = np.flatnonzero(has.any(axis=0))
    blocks = blocks[np.sort(np.unique(has[:, blocks], axis=1, return_index=True)[1])][:_MOST_ROWS]
    if len(blocks) < 3:
        return
    work.add(len(blocks) * (_BLOCK + len(blocks) ** 2 * len(has) // _PRODUCTS))
    member = has[:, blocks]
    each = member.astype(float) * shares[halves, None]
    pairs = each.T @ member
    found: list[tuple[float, tuple[int, ...]]] = []
    for i in range(len(blocks) - 2):
        # Sets with two of three count once, those with all of them three times in pairs.
        three = (each[:, i, None] * member).T @ member
        sums = pairs[i, :, None] + pairs[i, None, :] + pairs - 2 * three
        later = np.triu(sums[i + 1 :, i + 1 :], 1)
        for j, k in zip(*np.nonzero(later > 1 + VIOLATED), strict=True):
            found.append((-round(float(later[j, k]), 9), (i, i + 1 + int(j), i + 1 + int(k))))
    for _, three in sorted(found)[:AT_ONCE]:
        weights = np.asarray(rows[:, blocks[list(three)]].sum(axis=1)).ravel() // 2
        yield Cut(weights, 1)


def of_cycles(problem: FusionProblem, rows: csr_matrix, picked: Sequence[int]) -> Iterator[Cut]:
    """Inequalities that say of the cycles of a cover that they are none."""
    for cycle in find_cycles(problem, picked):
        for entered in True, False:
            yield _of_cycle(problem, rows, cycle, entered)


def _of_cycle(problem: FusionProblem, rows: csr_matrix, cycle: Cycle, entered: bool) -> Cut:
    """The groups of a cycle, and others that would wait for each other just so.

    Its groups ``k`` are entered at ``e_k`` and left at ``l_k``. Another group is as the k-th if it
    has ``e_k``, and something that ``l_k`` depends on; or, if not ``entered``, ``l_k`` and
    something that depends on ``e_k``. A plan has one such group at most, and not one for each k,
    unless one is as several.
    """
    counts = np.zeros(rows.shape[0], np.int64)
    for _, first, last in cycle:
        if entered:
            one, other = 1 << first, problem.above[last] | 1 << last
        else:
            one, other = 1 << last, problem.below[first] | 1 << first
        counts += _having(problem, rows, one) & _having(problem, rows, other)
    return Cut(np.where(counts > 1, counts - 1, counts), len(cycle) - 1)


def _having(problem: FusionProblem, rows: csr_matrix, some: int) -> npt.NDArray[np.bool_]:
    """Which sets have some of the operators."""
    problem.evaluator.work.add(len(problem.blocks) + rows.nnz // _ENTRIES)
    blocks = np.array([block & some > 0 for block in problem.blocks], np.int64)
    having: npt.NDArray[np.bool_] = rows @ blocks > 0
    return having
