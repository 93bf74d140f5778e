"""How long the HTML report takes to open and to answer, in headless Chromium.

``python -m benchmarks.html_page [--operators 1000]``: for networks of that many operators, the size
of the page, and milliseconds until it is drawn, from a click on an operator until it is marked and
painted, from closing a group, and from a letter of a search. Needs ``pip install playwright`` and
Debian's ``chromium``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate

from tests.browser import open_browser
from torch_getfuse.ir import Op, OpGraph, Read, Tensor, Window
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.fusion_group import make_group
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.reporting.report import Report
from torch_getfuse.reporting.section import Section

BUFFER = 1 << 30

Reads = Callable[[int], list[int]]
NETWORKS: dict[str, tuple[Reads, int]] = {
    "chain, groups of 10": (lambda i: [i - 1], 10),
    "residual blocks, groups of 8": (lambda i: [i - 1, i - 4] if i % 4 == 0 and i else [i - 1], 8),
    "residual blocks, no fusion": (lambda i: [i - 1, i - 4] if i % 4 == 0 and i else [i - 1], 1),
    "each reads the 8 before, groups of 20": (lambda i: list(range(max(0, i - 8), i)), 20),
    "residual blocks, one group": (lambda i: [i - 1, i - 4] if i % 4 == 0 and i else [i - 1], 0),
}
"""Name -> which operators each reads, and operators of a group (0: all)."""

CLICK = """element => new Promise(done => {
  const start = performance.now();
  element.dispatchEvent(new MouseEvent('click', {bubbles: true}));
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""
TYPE = """element => new Promise(done => {
  const start = performance.now();
  element.value = 'block9';
  element.dispatchEvent(new InputEvent('input', {bubbles: true}));
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""
DRAWN = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"


def network(operators: int, reads: Reads, group: int) -> Report:
    """A report of a synthetic network, with the operators in groups as they come."""
    shape = (1, 16, 28, 28)
    names = [f"block{i // 8}.layer{i}" for i in range(operators)]
    window = Window.sliding((3, 3), padding=(1, 1))
    ops = tuple(
        Op(
            name,
            "conv2d",
            tuple(
                Read(names[j] if j >= 0 else "input", window if k == 0 else Window.identity())
                for k, j in enumerate(dict.fromkeys(reads(i) or [-1]))
            ),
            name,
            weight_elements=2304,
            mixes_channels=True,
        )
        for i, name in enumerate(names)
    )
    tensors = {name: Tensor.of(name, shape) for name in ["input", *names]}
    graph = OpGraph(("input",), (names[-1],), ops, tensors)
    scheme = Lbdf(graph, activation_bytes=1, weight_bytes=1)
    size = group or operators
    masks = [
        sum(1 << i for i in range(start, min(start + size, operators)))
        for start in range(0, operators, size)
    ]
    groups = tuple(make_group(scheme, mask, BUFFER) for mask in masks)
    return Report([Section(PartitionPlan(graph, "lbdf", "line", BUFFER, 1, 1, groups))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operators", type=int, default=1000)
    operators = parser.parse_args().operators
    rows = []
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
        for name, (reads, group) in NETWORKS.items():
            path = Path(folder) / "report.html"
            path.write_text(network(operators, reads, group).to_html(), encoding="utf-8")
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            page.goto(path.as_uri())
            row = [name, f"{path.stat().st_size / 1024:.0f} KB", page.evaluate(DRAWN)]
            page.click("text=open all")
            row.append(page.eval_on_selector("[data-op='5']", CLICK))
            row.append(page.eval_on_selector(".foldhit", CLICK))
            page.click("role=tab[name='Operators']")
            row.append(page.eval_on_selector("input[aria-label='search operators']", TYPE))
            rows.append(row)
            page.close()
    headers = ("network", "page", "drawn", "click", "close a group", "search")
    print(f"{operators} operators, times in ms")
    print(tabulate(rows, headers, floatfmt=".0f"))


if __name__ == "__main__":
    main()
