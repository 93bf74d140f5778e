"""The paper's claims beside our figures; every verdict is computed from rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from benchmarks.reproduction import published
from benchmarks.reproduction.onnx_operators import SUFFIX
from benchmarks.reproduction.requests import (
    AS_ONNX,
    CONTROLS,
    CURVE_END,
    EARLY,
    GETS,
    TABLE_5_NETWORK,
    Request,
    curve,
)
from benchmarks.reproduction.results import MB, Cell, Column, Results

HOLDS, FAILS, OPEN = "holds", "does not hold", "not run yet"

NAMES = {
    "none": "none",
    "rgexplainer": "RG",
    "pgexplainer": "PG",
    "gnnexplainer": "GNNE",
    "saliency": "saliency",
    "random": "random edges",
    "all": "all edges",
    "plain": "local, as worded",
    "plain-edits": "... + merge and cut",
    "local": "local",
    "local-merged": "... over merged blocks",
    "nsga2": "NSGA-II",
}
"""How explainers and searches are called in tables; random search is named by its table."""


@dataclass(frozen=True)
class Claim:
    """A claim, the figure that stands for it in the paper, ours, and whether it holds."""

    text: str
    paper: str
    ours: str
    verdict: str


def paper_claims(results: Results) -> list[Claim]:
    """What the paper claims."""
    found = [*_never_worse(results), *_reductions(results)]
    found += _budgets(results)
    found += _rectify(results)
    return [*found, _accuracy(results)] if results.mode.data else found


def own_claims(results: Results) -> list[Claim]:
    """What the paper does not ask: small budgets, the controls, and how good ``auto`` is."""
    found = [*_granularity(results), *_early(results), *_controls(results)]
    return [*found, *_rectify_controls(results), *_auto(results)]


def search_name(search: str) -> str:
    """``"random search"``, ``"local search"``, ..."""
    return {"random": "random search", "local": "local search"}.get(search, NAMES[search])


# -- never worse ----------------------------------------------------------------------------


def _never_worse(results: Results) -> Iterator[Claim]:
    columns = list(results.columns())
    first = results.mode.granularities[0]
    chosen_by = list(_views(results, columns))
    views = [
        (f"Tables II to IV, {title}", [c for c in chosen if c.request.search != "plain"])
        for title, chosen in chosen_by
    ]
    _, paper = chosen_by[0]
    plain = [c for c in paper if c.request.search == "plain"]
    views.append((f"local search as worded, {first}", plain))
    for title, chosen in views:
        yield _count(f"GET never worse than the baseline ({title})", chosen, best=False)
        text = f"The best of the three GETs never worse than the baseline ({title})"
        yield _count(text, chosen, best=True)


def _views(results: Results, columns: Sequence[Column]) -> Iterator[tuple[str, list[Column]]]:
    """The columns of the paper's setting, of LBDF's second granularity, and of ONNX's operators."""
    first, *others = results.mode.granularities
    written_out = [c for c in columns if c.request.network in AS_ONNX]
    columns = [c for c in columns if c.request.network not in AS_ONNX]
    lbdf = [c for c in columns if c.request.scheme == "lbdf"]
    paper = [c for c in lbdf if c.request.granularity == first]
    if "brr" in results.mode.schemes:
        yield f"{first} and BRR", [*paper, *(c for c in columns if c.request.scheme == "brr")]
    else:
        yield first, paper
    for name in others:
        yield name, [c for c in lbdf if c.request.granularity == name]
    for name in results.mode.granularities:
        if chosen := [c for c in written_out if c.request.granularity == name]:
            yield f"{name}, operators of ONNX", chosen


def _least(ratios: Mapping[str, float]) -> list[tuple[str, float]]:
    return [min(ratios.items(), key=lambda entry: entry[1])] if ratios else []


def _count(text: str, columns: Sequence[Column], best: bool) -> Claim:
    """How many cells are above the baseline, ours and the paper's of the same columns."""
    paper = ours = paper_worse = ours_worse = 0
    complete = True
    worst: tuple[float, str] = 0.0, ""
    for column in columns:
        request = column.request
        known = published.column(request.search, request.scheme, request.network)
        printed = {n: known[n] / known["none"] for n in column.explained if n in known}
        theirs = _least(printed) if best else list(printed.items())
        paper += len(theirs)
        paper_worse += sum(ratio > 1 for _, ratio in theirs)
        ratios = column.ratios
        finished = len(ratios) == len(column.explained)
        complete &= finished
        if best:  # of three, known once all three are
            ratios = dict(_least(ratios)) if finished else {}
        for name, ratio in ratios.items():
            ours += 1
            ours_worse += ratio > 1
            place = f"{NAMES[name]}, {search_name(request.search)}, {request.network}"
            place += ", BRR" if request.scheme == "brr" else ""
            worst = max(worst, (ratio, place))
    told = f"worse in {ours_worse} of {ours}"
    if ours_worse:
        told += f"; worst ×{worst[0]:.2f} ({worst[1]})"
    verdict = FAILS if ours_worse else HOLDS if complete and ours else OPEN
    return Claim(text, f"worse in {paper_worse} of {paper}", told if ours else "", verdict)


# -- how much less --------------------------------------------------------------------------


def _reductions(results: Results) -> Iterator[Claim]:
    first, *others = results.mode.granularities
    for text, network, least, searches in (
        ("Over 20 % less DRAM access", "efficientnet_b3", 20.0, ("nsga2", "plain", "random")),
        ("10 % less", "mobilenet_v2", 10.0, ("local", "plain")),
        ("16.9 % less", "resnet152", 16.9, ("random",)),
    ):
        wanted = [(search, first) for search in searches]
        wanted[1:1] = [(searches[0], granularity) for granularity in others]
        for search, granularity in wanted:
            column = _column(results, search, network, granularity)
            if column is not None:
                yield _reduction(f"{text} on {network}", column, least)


def _column(
    results: Results,
    search: str,
    network: str,
    granularity: str,
    explained: Sequence[str] = GETS,
) -> Column | None:
    for column in results.columns(explained):
        r = column.request
        if (r.search, r.network, r.scheme, r.granularity) == (search, network, "lbdf", granularity):
            return column
    return None


def _reduction(text: str, column: Column, least: float) -> Claim:
    request = column.request
    known = published.column(request.search, "lbdf", request.network)
    paper = f"{100 * (1 - min(known.values()) / known['none']):.1f} %" if known else ""
    title = f"{text}: {search_name(request.search)}, {request.granularity}"
    ratios, baseline = column.ratios, column.baseline
    if baseline is None:
        return Claim(title, paper, "", OPEN)
    told = []
    reduction = 0.0
    if ratios:
        name, ratio = _least(ratios)[0]
        reduction = round(100 * (1 - ratio), 1)
        told.append(f"{reduction:.1f} % ({NAMES[name]})")
    possible = 100.0
    if baseline.optimum is not None:
        possible = round(100 * (1 - baseline.optimum / baseline.mean), 1)
        told.append(f"the optimum is {possible:.1f} % below the baseline")
    # No explainer can save more than there is.
    refuted = possible < least or len(ratios) == len(column.explained)
    verdict = HOLDS if ratios and reduction >= least else FAILS if refuted else OPEN
    return Claim(title, paper, "; ".join(told), verdict)


def _granularity(results: Results) -> Iterator[Claim]:
    """Where the reductions of EfficientNet-B3 come from: its operators, the repair, the blame."""
    network = "efficientnet_b3"
    for name, title in ((network, "torch's operators"), (f"{network}{SUFFIX}", "ONNX's")):
        for search in ("plain", "local", "nsga2", "random"):
            for granularity in results.mode.granularities:
                column = _column(results, search, name, granularity, (*GETS, *CONTROLS))
                if column is None or column.baseline is None:
                    continue
                text = f"10 % less on {network}, {title}: {search_name(search)}, {granularity}"
                less = {
                    explainer: round(100 * (1 - ratio), 1)
                    for explainer, ratio in column.ratios.items()
                }
                told = ", ".join(f"{NAMES[key]} {less[key]} %" for key in _order(less))
                gap = column.baseline.gap
                told += "" if gap is None else f"; the baseline is {gap:.1f} % above the optimum"
                gets = [less[key] for key in GETS if key in less]
                whole = len(less) == len(column.explained)
                if whole and max(gets) >= 10:
                    least = min(less[key] for key in CONTROLS)
                    told += "; repair by any edges does it" if least >= 10 else "; blame does it"
                holds = any(value >= 10 for value in gets)
                # No explainer can save more than there is.
                refuted = whole or (gap is not None and 100 * gap / (100 + gap) < 10)
                yield Claim(text, "", told, HOLDS if holds else FAILS if refuted else OPEN)


# -- budgets --------------------------------------------------------------------------------


def _budgets(results: Results) -> Iterator[Claim]:
    end = CURVE_END // results.mode.divide
    start = end // 4
    wanted = curve(results.mode)
    for base in (request for request in wanted if request.explainer == "none"):
        text = (
            f"GET at {start} plans beats the baseline at {end}, {base.network} "
            f"({search_name(base.search)})"
        )
        baseline = results.cell(base)
        names = [name for name in GETS if replace(base, explainer=name) in wanted]
        cells = [results.cell(replace(base, explainer=name)) for name in names]
        known = [cell for cell in cells if cell is not None]
        if baseline is None or not known:
            yield Claim(text, "yes (Fig. 5)", "", OPEN)
            continue
        best = min(known, key=lambda cell: cell.best_at(start))
        ours, theirs = best.best_at(start), baseline.best_at(end)
        refuted = theirs == baseline.optimum or len(known) == len(cells)
        verdict = HOLDS if ours < theirs else FAILS if refuted else OPEN
        told = f"{ours / MB:.3f} MB ({NAMES[best.request.explainer]}) against {theirs / MB:.3f} MB"
        told += "; the baseline is at the optimum" if theirs == baseline.optimum else ""
        yield Claim(text, "yes (Fig. 5)", told, verdict)


def _early(results: Results) -> Iterator[Claim]:
    """The paper's reductions in the same runs, stopped while the baseline is far from its end."""
    first = results.mode.granularities[0]
    for network, least, searches in (
        ("efficientnet_b3", 20, ("nsga2", "local", "plain")),
        ("mobilenet_v2", 10, ("local", "plain")),
    ):
        for search in searches:
            column = _column(results, search, network, first, (*GETS, *CONTROLS))
            if column is None:
                continue
            plans = max(1, column.request.budget // EARLY)
            text = f"{least} % less on {network} at {plans} plans: {search_name(search)}, {first}"
            less = {}
            for name, cell in column.explained.items():
                if cell is not None and column.baseline is not None:
                    ratio = cell.best_at(plans) / column.baseline.best_at(plans)
                    less[name] = round(100 * (1 - ratio), 1)
            told = ", ".join(f"{NAMES[name]} {less[name]} %" for name in _order(less))
            gets = [less[name] for name in GETS if name in less]
            refuted = bool(gets) and len(gets) == sum(name in GETS for name in column.explained)
            if column.baseline is not None and column.baseline.optimum is not None:
                start = column.baseline.best_at(plans)
                possible = round(100 * (1 - column.baseline.optimum / start), 1)
                told += f"; the optimum {possible} %"
                refuted |= possible < least
            holds = any(value >= least for value in gets)
            yield Claim(text, "", told, HOLDS if holds else FAILS if refuted else OPEN)


# -- rectify rates --------------------------------------------------------------------------


def table_5_cell(results: Results, search: str, explainer: str) -> Cell | None:
    """A cell of Table V."""
    budget = 2000 // results.mode.divide
    return results.cell(
        Request(
            "search",
            TABLE_5_NETWORK,
            buffer_kb=128,
            search=search,
            explainer=explainer,
            budget=budget,
        )
    )


def _rectify(results: Results) -> Iterator[Claim]:
    for search, where, ours in _measured_rates(results):
        known = {name: published.TABLE_5[search, name][0] for name in GETS}
        mine = ours.get("rgexplainer")
        yield Claim(
            f"RG-Explainer rectifies over 90 % of the invalid groups ({where})",
            f"{known['rgexplainer']} %",
            "" if mine is None else f"{mine:.1f} %",
            _verdict(None if mine is None else mine > 90),
        )
        gets = {name: ours[name] for name in GETS if name in ours}
        whole = len(gets) == len(GETS)
        yield Claim(
            f"RG rectifies most, then GNNE, then PG ({where})",
            _rates(known),
            _rates(gets),
            _verdict(_order(gets) == _order(known) if whole else None),
        )


def _rectify_controls(results: Results) -> Iterator[Claim]:
    for _, where, ours in _measured_rates(results):
        text = f"Each GET rectifies more than random edges ({where})"
        gets = {name: ours[name] for name in GETS if name in ours}
        control = ours.get("random")
        if control is None or not gets:
            yield Claim(text, "", "", OPEN)
            continue
        told = f"{_rates(gets)}; random edges {control:.1f} %"
        refuted = any(rate <= control for rate in gets.values())
        whole = len(gets) == len(GETS)
        yield Claim(text, "", told, FAILS if refuted else HOLDS if whole else OPEN)


def _measured_rates(results: Results) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Per search: where it was measured, and the rectify rates by explainer, percent."""
    if TABLE_5_NETWORK in results.mode.table_34:
        for search in ("local", "random"):
            cells = {name: table_5_cell(results, search, name) for name in (*GETS, "random")}
            rates = {name: cell.rectify_rate for name, cell in cells.items() if cell is not None}
            yield search, f"{search_name(search)}, {TABLE_5_NETWORK}", rates


def _order(rates: Mapping[str, float]) -> list[str]:
    return sorted(rates, key=lambda name: -rates[name])


def _rates(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{NAMES[name]} {rates[name]:.1f} %" for name in _order(rates))


def _verdict(holds: bool | None) -> str:
    return OPEN if holds is None else HOLDS if holds else FAILS


# -- predictor, controls, auto --------------------------------------------------------------


def _accuracy(results: Results) -> Claim:
    text = "Accuracy and F1 of the validity predictors over 95 % (test part)"
    row = next((row for _, row in results.of_kind("predictors")), None)
    if row is None:
        return Claim(text, "over 95 %", "", OPEN)
    parts = [score for score in row["scores"] if score["on"] == "test part"]
    least = min(min(score["accuracy %"], score["F1 %"]) for score in parts)
    told = f"at least {least:.1f} % ({len(parts)} predictors)"
    return Claim(text, "over 95 %", told, _verdict(least > published.ACCURACY))


def _controls(results: Results) -> Iterator[Claim]:
    """Is it the explanation that helps, or any splitting by a recursive tree?"""
    for control in ("random", "all"):
        columns = list(results.columns((*GETS, control)))
        for title, chosen in _views(results, columns):
            pairs: list[tuple[float, float]] = []
            complete = True
            for column in chosen:
                ratios = column.ratios
                gets = [ratios[name] for name in GETS if name in ratios]
                complete &= len(ratios) == len(column.explained)
                if gets and control in ratios:
                    pairs.append((mean(gets), ratios[control]))
            text = f"GETs end below the control {NAMES[control]}, mean of all columns ({title})"
            if not pairs:
                yield Claim(text, "", "", OPEN)
                continue
            gets, theirs = mean(a for a, _ in pairs), mean(b for _, b in pairs)
            told = f"×{gets:.3f} of the baseline against ×{theirs:.3f}, {len(pairs)} columns"
            yield Claim(text, "", told, _verdict(gets < theirs if complete else None))


def _auto(results: Results) -> Iterator[Claim]:
    granularity = results.mode.granularities[0]
    for network in ("efficientnet_b3",):
        if network not in results.mode.table_2:
            continue
        for search in ("local", "plain"):
            column = _column(results, search, network, granularity)
            assert column is not None, "Table II has these searches"
            auto = results.one(replace(column.request, kind="auto", search="", budget=0))
            text = f"auto at least 20 % below {search_name(search)} on {network}, {granularity}"
            if auto is None or column.baseline is None:
                yield Claim(text, "", "", OPEN)
                continue
            less = 100 * (1 - auto["dram_bytes"] / column.baseline.mean)
            yield Claim(text, "", f"{less:.1f} %", _verdict(round(less, 1) >= 20))
    yield _never_beaten(results)


def _never_beaten(results: Results) -> Claim:
    below = compared = 0
    complete = True
    for request, row in results.of_kind("search"):
        auto = results.one(
            Request("auto", request.network, request.scheme, request.granularity, request.buffer_kb)
        )
        if row is None or auto is None:
            complete = False
            continue
        compared += 1
        below += row["dram_bytes"] < auto["dram_bytes"]
    return Claim(
        "auto never worse than any run of any search with any explainer",
        "",
        f"worse than {below} of {compared} runs" if compared else "",
        FAILS if below else HOLDS if complete and compared else OPEN,
    )
