"""Rows by request, and the figures that tables and claims take from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from benchmarks.reproduction.requests import (
    GETS,
    Mode,
    Request,
    explainers_of,
    problems,
    searches_of,
    seeded,
)

MB = 1e6
"""The paper's MB: 10**6 bytes."""


@dataclass(frozen=True)
class Cell:
    """One search with one explainer on one problem, over all seeds.

    Attributes:
        request: the cell, with seed 0.
        rows: one per seed.
        optimum: proved least DRAM access in bytes; ``None`` where it is not run yet.
    """

    request: Request
    rows: Sequence[Mapping[str, Any]]
    optimum: int | None

    @property
    def drams(self) -> list[int]:
        """DRAM access of the best plan of each seed, bytes."""
        return [row["dram_bytes"] for row in self.rows]

    @property
    def mean(self) -> float:
        """Mean DRAM access over the seeds, bytes."""
        return mean(self.drams)

    @property
    def gap(self) -> float | None:
        """Mean gap to the optimum, percent."""
        return None if self.optimum is None else 100 * (self.mean / self.optimum - 1)

    @property
    def rectify_rate(self) -> float:
        """Percent of the distinct invalid groups that the explanation's own cuts rectified."""
        attempts = sum(row["attempts"] for row in self.rows)
        return 100 * sum(row["rectified"] for row in self.rows) / max(1, attempts)

    @property
    def seconds(self) -> float:
        """Mean time of a search."""
        return mean(row["seconds"] for row in self.rows)

    def best_at(self, plans: int) -> float:
        """Mean over the seeds of the least DRAM access after so many plans, bytes."""
        return mean(
            min(cost for count, cost in row["history"] if count <= plans) for row in self.rows
        )

    def gap_at(self, plans: int) -> float | None:
        """Mean gap to the optimum of the best after so many plans, percent."""
        return None if self.optimum is None else 100 * (self.best_at(plans) / self.optimum - 1)

    def plans_to(self, bytes_: float) -> list[int | None]:
        """Per seed, after how many plans the best has no more than so many bytes."""
        return [
            next((count for count, cost in row["history"] if cost <= bytes_), None)
            for row in self.rows
        ]


class Results:
    """What has been run of a mode.

    Args:
        mode: the mode.
        requests: all of its runs.
        rows: of those that are finished.
    """

    def __init__(
        self, mode: Mode, requests: Sequence[Request], rows: Mapping[Request, Mapping[str, Any]]
    ) -> None:
        self.mode = mode
        self.requests = requests
        self.rows = rows

    def one(self, request: Request) -> Mapping[str, Any] | None:
        """The row of a run, or ``None``."""
        return self.rows.get(request)

    def optimum(self, problem: Request) -> int | None:
        """Proved least DRAM access of a problem, bytes."""
        row = self.one(Request("optimum", *_where(problem)))
        return None if row is None else row["dram_bytes"]

    def cell(self, request: Request) -> Cell | None:
        """A cell with all its seeds, or ``None`` while one is missing."""
        rows = [self.rows.get(each) for each in seeded(self.mode, request)]
        found = [row for row in rows if row is not None]
        if len(found) < len(rows):
            return None
        return Cell(replace(request, seed=0), found, self.optimum(request))

    def of_kind(self, kind: str) -> Iterator[tuple[Request, Mapping[str, Any] | None]]:
        """Runs of a kind with their rows."""
        return ((r, self.rows.get(r)) for r in self.requests if r.kind == kind)

    def columns(self, explained: Sequence[str] = GETS) -> Iterator[Column]:
        """Every column of Tables II, III and IV with the explainers asked for."""
        for table, problem in problems(self.mode):
            for search in searches_of(table, problem.scheme):
                names = [name for name in explainers_of(self.mode, search) if name in explained]
                base = replace(problem, kind="search", search=search)
                cells = {
                    name: self.cell(replace(base, explainer=name)) for name in ("none", *names)
                }
                yield Column(base, cells.pop("none"), cells)


@dataclass(frozen=True)
class Column:
    """A search on a problem: the cell without explainer, and those with one.

    Attributes:
        request: network, cost model, search.
        baseline: without an explainer; ``None`` while it is not run.
        explained: by explainer.
    """

    request: Request
    baseline: Cell | None
    explained: Mapping[str, Cell | None]

    @property
    def ratios(self) -> dict[str, float]:
        """Mean DRAM access of the finished explained cells as shares of the baseline's."""
        if self.baseline is None:
            return {}
        return {
            name: cell.mean / self.baseline.mean
            for name, cell in self.explained.items()
            if cell is not None
        }


def _where(problem: Request) -> tuple[str, str, str, int]:
    return problem.network, problem.scheme, problem.granularity, problem.buffer_kb
