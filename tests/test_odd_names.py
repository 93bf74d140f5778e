"""Names that are no identifiers, and text that a terminal, browser or spreadsheet acts on."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torch_getfuse
from torch_getfuse.reporting.export import HTML, MARKDOWN, csv_text

NAMES = ("it's", "$x^$", "a b", "<script>alert(1)</script>", "=1+1", "|", "\x1b[31m", "\u202e", "`")
X = torch.zeros(1, 3, 16, 16)


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.inside = nn.ModuleDict({name: nn.Conv2d(3, 4, 3)})
        self.outside = nn.Conv2d(4, 4, 3)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(self.inside[self.name](x))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_every_form_of_every_name(name: str, tmp_path: Path) -> None:
    model = Named(name).eval()
    plan = torch_getfuse.plan(model, (X,), buffer="2KB")
    plan.save(tmp_path / "plan.json")
    assert torch_getfuse.load_plan(tmp_path / "plan.json").verify() == plan
    with torch.no_grad():
        assert torch.equal(torch_getfuse.split(model, (X,), plan)(X), model(X))
    report = torch_getfuse.report(model, X, buffer="2KB")
    why = torch_getfuse.explain(model, (X,), buffer="2KB", explainers=["all"])
    texts = [str(report), report.to_csv(), report.to_markdown(), report.to_html(), str(plan)]
    texts += [str(why), why.to_markdown(), why.to_dot(), report.to_json()]
    for text in texts:
        assert text.replace("\n", "").isprintable()
    for text in (report.to_html(), report.to_markdown(), why.to_markdown()):
        assert "<script>alert" not in text
    for suffix in ("svg", "png", "dot", "md"):
        why.save(tmp_path / f"why.{suffix}")
    drawn = ElementTree.parse(tmp_path / "why.svg")
    assert drawn.getroot().tag.endswith("svg")


def test_a_spreadsheet_runs_no_cell() -> None:
    cells = ["=1+1", "+1", "-1", "@sum", "\tx", "plain", -1]
    text = csv_text([{"cell": cell} for cell in cells], ["cell"])
    read = [row["cell"] for row in csv.DictReader(io.StringIO(text))]
    assert read == ["'=1+1", "'+1", "'-1", "'@sum", "'\tx", "plain", "-1"]


def test_markdown_shows_names_as_they_are() -> None:
    text = MARKDOWN.table([["a|b", "*x* _y_ a_b <i> `c` [d](e) $f$ \\"]], (), "ll")
    assert text.splitlines()[0].count("|") == 3, "a table has a line of headers"
    assert r"a\|b" in text
    assert r"\*x\* \_y\_ a_b \<i\> \`c\` \[d\](e) \$f\$ \\" in text
    assert MARKDOWN.paragraph("a&lt;b") == r"a\&lt;b", "an entity of a name is its characters"


def test_html_has_no_markup_of_names() -> None:
    text = HTML.table([["<b>", "&"]], ("<i>", ""), "ll")
    assert not re.search(r"<[bi]>", text)
    assert "&lt;b&gt;" in text
