"""The interactive page of a report in headless Chromium, where both it and playwright are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import CHROMIUM, MISSING, open_browser
from test_html_page import EVIL, blocks, plan_of, renamed

from torch_getfuse.explain_graph import explain_graph
from torch_getfuse.options import Options
from torch_getfuse.reporting.html.page import Origin
from torch_getfuse.reporting.report import Report
from torch_getfuse.reporting.section import Section

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest.importorskip("playwright", reason="needs playwright: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

BUFFER = 1000


@dataclass
class Opened:
    """A page, with whatever it complained of and asked for."""

    page: Page
    trouble: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of a plan in groups with an explanation, one in steps, and one of two graphs."""
    folder = tmp_path_factory.mktemp("pages")
    graph = renamed(blocks(), EVIL)
    graph = replace(graph, ops=tuple(replace(op, macs=1024) for op in graph))
    options = Options(buffer=BUFFER, activation_bytes=1, weight_bytes=1)
    why = explain_graph(graph, options, None, ["all", "random"])
    groups = Section(plan_of(graph, BUFFER))
    steps = Section(plan_of(blocks(), 2600, "cascade"))
    origin = Origin("my:model", {}, "torch-getfuse report my:model -o page.html")
    pages = {
        "groups": Report([groups], origin=origin).to_html(why),
        "steps": Report([steps]).to_html(),
        "two": Report(
            [
                Section(groups.plan, "graph 0", {"aten.sort": 2}, ("a note",)),
                Section(steps.plan, "graph 1"),
            ],
            ("graph 2 runs unplanned: no reason",),
        ).to_html(),
    }
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def opened(browser: Browser, folder: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """The page named by the parameter, or that in groups; no complaint, no request at the end."""
    given: dict[str, Any] = {"name": "groups", "width": 1400, **getattr(request, "param", {})}
    context = browser.new_context(
        viewport={"width": given["width"], "height": 850}, color_scheme=given.get("theme", "light")
    )
    page = context.new_page()
    found = Opened(page)
    page.on("console", lambda message: found.trouble.append(message.text))
    page.on("pageerror", lambda error: found.trouble.append(str(error)))
    page.on("dialog", lambda dialog: found.trouble.append(dialog.message))
    page.on("request", lambda asked: found.requests.append(asked.url))
    address = (folder / f"{given['name']}.html").as_uri()
    page.goto(address)
    page.wait_for_selector(".unit")
    yield found
    assert found.trouble == []
    assert found.requests == [address]
    context.close()


def on(name: str = "groups", **more: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("opened", [{"name": name, **more}], indirect=True)


def click(page: Page, selector: str) -> None:
    """A click on an element of the graph, wherever it lies on the canvas."""
    page.eval_on_selector(
        selector, "element => element.dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )


def test_it_draws_every_operator_and_says_where_it_comes_from(opened: Opened) -> None:
    page = opened.page
    assert page.locator("h1").inner_text() == "my:model"
    assert page.locator(".mast pre").inner_text() == "torch-getfuse report my:model -o page.html"
    graph = blocks()
    drawn = page.locator(".op").count() + page.locator(".unit.unfusable").count()
    assert drawn == len(graph)
    assert page.locator(".unit.unfusable").count() == len(plan_of(graph, BUFFER).apart) > 0
    assert page.locator(".edge.skip").count() >= 3
    assert page.locator("#plain").is_hidden()


def test_a_click_shows_details(opened: Opened) -> None:
    page = opened.page
    click(page, "[data-op='1']")
    details = page.locator(".details")
    assert details.locator("h3").inner_text().endswith("conv1")
    assert "40 elements, 40 B" in details.inner_text()
    assert details.locator("dt:text-is('MACs') + dd").inner_text() == "1,024"
    assert page.locator(".op.picked").count() == 1
    assert page.locator(".edge.near").count() >= 2
    details.locator("button:has-text('Group')").click()
    assert "What fills the buffer" in details.inner_text()
    assert page.locator(".unit.picked").count() == 1
    assert page.locator(".column.picked").count() == 1
    assert page.locator("tr.picked").count() == 1
    click(page, ".edge.chip")
    assert "within one group, on chip" in details.inner_text()


def test_a_name_is_shown_as_it_is(opened: Opened) -> None:
    page = opened.page
    click(page, "[data-op='0']")
    assert page.locator(".details h3").inner_text().endswith(EVIL)
    assert page.locator("img").count() == 0


def test_a_tip_under_the_pointer(opened: Opened) -> None:
    page = opened.page
    page.locator("[data-op='1'] rect").hover()
    assert "conv1" in page.locator(".tip").inner_text()
    page.locator("h1").hover()
    assert page.locator(".tip").is_hidden()


def test_units_close_and_open(opened: Opened) -> None:
    page = opened.page
    operators = page.locator(".op").count()
    page.locator("text=close all").click()
    assert page.locator(".op").count() == 0
    assert page.locator(".unit.closed:not(.unfusable)").count() > 1
    closed = page.evaluate("document.querySelector('.units').getBBox().height")
    click(page, ".foldhit")
    assert 0 < page.locator(".op").count() < operators
    assert page.evaluate("document.querySelector('.units').getBBox().height") > closed
    page.locator("text=open all").click()
    assert page.locator(".op").count() == operators


@on(name="groups")
@pytest.mark.parametrize("closed", [False, True])
def test_nothing_overlaps(opened: Opened, closed: bool) -> None:
    page = opened.page
    if closed:
        page.locator("text=close all").click()
    boxes = page.eval_on_selector_all(
        ".op > rect, .unit.closed > .body, .end > rect",
        "all => all.map(e => e.getBoundingClientRect()).map(r => [r.x, r.y, r.right, r.bottom])",
    )
    assert len(boxes) > 3
    for k, (left, top, right, bottom) in enumerate(boxes):
        for x, y, x2, y2 in boxes[:k]:
            assert right <= x or x2 <= left or bottom <= y or y2 <= top


def test_search_and_sort(opened: Opened) -> None:
    page = opened.page
    page.locator("role=tab[name='Operators']").click()
    panel = page.locator("[role=tabpanel]:visible")
    panel.locator("input").fill("ADD")
    visible = panel.locator("tbody tr:visible")
    assert visible.count() == 2
    assert panel.locator(".count").inner_text() == f"2 of {len(blocks())}"
    panel.locator("input").fill("")
    panel.locator("th button:text-is('weights')").click()
    sizes = panel.locator("tbody tr td:nth-child(6)").all_inner_texts()
    assert sizes[0] == "320 B"
    assert sizes[-1] == "0 B"
    panel.locator("th button:text-is('weights')").click()
    assert panel.locator("tbody tr td:nth-child(6)").first.inner_text() == "0 B"
    visible.last.locator("td").nth(1).click()
    assert page.locator(".details h3").inner_text().endswith("conv12")


def test_find_in_the_graph(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("/")
    page.keyboard.type("mul")
    page.keyboard.press("Enter")
    assert page.locator(".finder .count").inner_text() == "1 of 1"
    picked = page.locator(".op.picked")
    assert "mul9" in (picked.text_content() or "")
    box, frame = picked.bounding_box(), page.locator(".graph").bounding_box()
    assert box is not None
    assert frame is not None
    assert frame["y"] <= box["y"] <= frame["y"] + frame["height"]


def test_keyboard(opened: Opened) -> None:
    page = opened.page
    page.locator(".canvas").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator(".op.picked").get_attribute("data-op") == "0"
    page.keyboard.press("ArrowDown")
    assert page.locator(".op.picked").get_attribute("data-op") == "1"
    page.keyboard.press("Enter")
    assert page.locator(".unit.closed.picked").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".picked").count() == 0
    page.keyboard.press("c")
    assert page.locator(".op").count() == 0
    page.locator(".chart").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".column.picked").get_attribute("data-unit") == "0"


def test_an_explanation_comes_first(opened: Opened) -> None:
    page = opened.page
    answer = page.locator(".answer")
    assert answer.bounding_box()["y"] < page.locator(".plan").bounding_box()["y"]
    assert "too much" in answer.locator("h2").inner_text()
    headings = answer.locator("h3").all_inner_texts()
    assert headings[0] == "What fills the buffer"
    assert headings[1].startswith("Where the recursive split cuts")
    assert page.locator(".edge.blamed").count() > 0
    edges = answer.locator(".table").last
    assert edges.locator("th button").all_inner_texts()[3:5] == ["all", "random"]
    edges.locator("tbody button.link").first.click()
    assert "blamed" in page.locator(".details").inner_text()


@on(name="steps")
def test_a_plan_alone_has_no_answer(opened: Opened) -> None:
    assert opened.page.locator(".answer").count() == 0


@on(name="steps")
def test_steps_and_tensors_that_stay(opened: Opened) -> None:
    page = opened.page
    assert page.locator("role=tab[name='Steps']").count() == 1
    staying = page.locator(".chart .stay")
    plan = plan_of(blocks(), 2600, "cascade")
    assert staying.count() == len(plan.resident) > 0
    assert page.locator(".edge.stays").count() > 0
    click(page, ".chart .stay")
    assert "stays on chip from step" in page.locator(".details").inner_text()
    # Columns add up to what each step needs.
    tall = page.eval_on_selector_all(
        ".column",
        "all => all.map(c => [...c.querySelectorAll('rect')].slice(1)"
        ".reduce((sum, rect) => sum + rect.height.baseVal.value, 0))",
    )
    wanted = [150 * group.buffer_bytes / plan.buffer_bytes for group in plan.groups]
    assert tall == pytest.approx(wanted, abs=0.01)


@on(name="two")
def test_several_graphs(opened: Opened) -> None:
    page = opened.page
    assert page.locator("role=tab[name='Groups']").count() == 1
    text = page.locator("#app").inner_text()
    assert "graph 2 runs unplanned: no reason" in text
    assert "2 graphs: " in text
    assert "no rule for aten.sort (2)" in page.locator(".details").inner_text()
    assert "a note" in page.locator(".details").inner_text()
    page.locator("select").select_option("1")
    assert page.locator("role=tab[name='Steps']").count() == 1
    click(page, "[data-op='2']")
    assert page.locator(".details h3").inner_text().endswith("act2")


def brightness(page: Page) -> float:
    """Of the page's background, from 0 to 255."""
    text = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in text.strip("rgb()").split(",")) / 3


@on(theme="dark")
def test_dark_mode_and_its_switch(opened: Opened) -> None:
    page = opened.page
    assert brightness(page) < 60
    page.locator(".theme").click()
    assert brightness(page) > 200
    page.locator(".theme").click()
    assert brightness(page) < 60


@on(width=390)
def test_a_phone_scrolls_in_one_direction(opened: Opened) -> None:
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    graph = page.locator(".graph").bounding_box()
    assert graph is not None
    assert graph["width"] > 330
    text = page.locator(".op .name").first.bounding_box()
    assert text is not None
    assert text["height"] > 7


def test_without_scripts_the_tables_are_there(browser: Browser, folder: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((folder / "groups.html").as_uri())
    assert page.locator("#plain table").count() >= 3
    assert "DRAM access per sample" in page.locator("#plain").inner_text()
    context.close()
