"""Which runs the tables need, in the order in which they are run, and what each depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.reproduction import provenance
from benchmarks.reproduction.onnx_operators import SUFFIX
from benchmarks.reproduction.published import TABLE_2_NETWORKS, TABLE_34_NETWORKS

PROTOCOL = 1
"""Raised when a run is carried out in another way, so that older rows no longer count."""

GETS = ("rgexplainer", "pgexplainer", "gnnexplainer")
"""The paper's graph explanation techniques."""
CONTROLS = ("random", "all")
EXPLAINERS = ("none", *GETS, *CONTROLS)

RULE = "most_operators"
"""The paper's Algorithm 1 keeps the larger valid side; the package's default is least traffic."""

SEARCHES = ("plain", "local", "nsga2", "random")
LADDER = ("plain", "plain-edits", "local", "local-merged")
"""From the paper's local search, read literally, to the package's, one step at a time."""
LADDER_FACTOR = 4  # times the table's budget

CURVES = (("mobilenet_v2", 128, 4000), ("efficientnet_b3", 256, 5000))
"""Network, buffer in KB and budget of Fig. 5's runs."""
CURVE_END = 4000
EARLY = 20
"""The share of a budget, one in so many plans, at which searches are looked at early."""
TABLE_5_NETWORK = "mobilenet_v2"

AS_ONNX = tuple(f"{name}{SUFFIX}" for name in ("efficientnet_b3", "deeplabv3_mobilenet_v3_large"))
"""The networks of Table II whose activations are several operators in ONNX."""

MODELS = (("lbdf", "line"), ("lbdf", "pixel"), ("brr", "line"))


@dataclass(frozen=True)
class Request:
    """One run.

    Attributes:
        kind: ``"search"``, ``"optimum"``, ``"auto"``, ``"samples"``, ``"predictors"`` or
            ``"explanation"``; what follows means nothing to some of them and then has its default.
        network: torchvision's name, with ``@onnx`` for the operators that ONNX has.
        scheme, granularity: the cost model; BRR has no granularity and says ``"line"``.
        buffer_kb: the on-chip buffer, KB.
        search: one of :data:`SEARCHES` or :data:`LADDER`.
        explainer: one of :data:`EXPLAINERS` or ``"saliency"``.
        budget: plans.
        seed: of everything that is drawn.
    """

    kind: str
    network: str = ""
    scheme: str = "lbdf"
    granularity: str = "pixel"
    buffer_kb: int = 0
    search: str = ""
    explainer: str = "none"
    budget: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Mode:
    """How much is run.

    Attributes:
        name: on the command line.
        table_2, table_34: networks of Table II, and of Tables III and IV.
        schemes: cost models of Tables III and IV.
        granularities: of LBDF; the paper's first.
        explainers: of all tables.
        seeds: runs per cell.
        divide: what budgets are divided by.
        data: whether Table I, Fig. 3 and the predictors are part of it; they need the data set
            that the predictors are trained on, which takes minutes to make.
        ladder: whether the steps from the paper's local search to the package's are part of it.
        left_out: (search, explainer) pairs that are not run.
    """

    name: str
    table_2: Sequence[str] = (*TABLE_2_NETWORKS, *AS_ONNX)
    table_34: Sequence[str] = TABLE_34_NETWORKS
    schemes: Sequence[str] = ("lbdf", "brr")
    granularities: Sequence[str] = ("pixel", "line")
    explainers: Sequence[str] = EXPLAINERS
    seeds: int = 3
    divide: int = 1
    data: bool = True
    ladder: bool = True
    left_out: Sequence[tuple[str, str]] = ()


MODES = {
    mode.name: mode
    for mode in (
        Mode("full"),
        # Both granularities of operators, and nothing else.
        Mode(
            "onnx",
            table_2=(*(name.removesuffix(SUFFIX) for name in AS_ONNX), *AS_ONNX),
            table_34=(),
            schemes=("lbdf",),
            data=False,
            ladder=False,
        ),
        # GNNExplainer under all searches would take longer than all the rest.
        Mode(
            "quick",
            table_2=TABLE_2_NETWORKS,
            granularities=("pixel",),
            seeds=1,
            divide=20,
            data=False,
            left_out=tuple((search, "gnnexplainer") for search in ("plain", "nsga2", "random")),
        ),
        Mode(
            "smallest",
            table_2=(),
            table_34=("squeezenet1_0",),
            schemes=("lbdf",),
            granularities=("pixel",),
            explainers=("none", "rgexplainer", *CONTROLS),
            seeds=1,
            divide=100,
            data=False,
        ),
    )
}


def problems(mode: Mode) -> Iterator[tuple[str, Request]]:
    """``"II"`` or ``"III"`` and a request with network, cost model, buffer and budget filled in."""
    for granularity in mode.granularities:
        for network in mode.table_34:
            yield "III", Request("", network, "lbdf", granularity, 128, budget=2000 // mode.divide)
        for network in mode.table_2:
            yield "II", Request("", network, "lbdf", granularity, 256, budget=5000 // mode.divide)
    if "brr" in mode.schemes:
        for network in mode.table_34:
            yield "III", Request("", network, "brr", "line", 128, budget=2000 // mode.divide)


def searches_of(table: str, scheme: str) -> tuple[str, ...]:
    """The searches of a table, the paper's and the plain one; BRR has no plain one."""
    return tuple(
        name
        for name in SEARCHES
        if (name != "nsga2" or table == "II") and (name != "plain" or scheme == "lbdf")
    )


def explainers_of(mode: Mode, search: str) -> list[str]:
    """The explainers of a mode that a search is run with."""
    return [name for name in mode.explainers if (search, name) not in mode.left_out]


def seeded(mode: Mode, request: Request) -> list[Request]:
    """A request once per seed."""
    return [replace(request, seed=seed) for seed in range(mode.seeds)]


def curve(mode: Mode) -> list[Request]:
    """Fig. 5, one request per network, search and explainer; seeds are not filled in.

    EfficientNet-B3's are cells of Table II.
    """
    return [
        Request(
            "search",
            network,
            buffer_kb=buffer_kb,
            search=search,
            explainer=explainer,
            budget=budget // mode.divide,
        )
        for network, buffer_kb, budget in CURVES
        if network in (*mode.table_34, *mode.table_2)
        for search in ("plain", "local", "random")
        for explainer in explainers_of(mode, search)
    ]


def curve_marks(mode: Mode) -> list[int]:
    """Budgets of Fig. 5: a few small ones, and 1,000 to 4,000 plans."""
    plans = (20, 100, 400, 1000, 2000, 3000, CURVE_END)
    return [count // mode.divide for count in plans]


def ladder(mode: Mode) -> list[Request]:
    """What the baseline needs: every problem of the first granularity, without an explainer."""
    if not mode.ladder:
        return []
    return [
        replace(problem, kind="search", search=search, budget=LADDER_FACTOR * problem.budget)
        for _, problem in problems(mode)
        if problem.granularity == mode.granularities[0]
        and problem.scheme == "lbdf"
        and problem.network not in AS_ONNX
        for search in LADDER
    ]


def requests(mode: Mode) -> list[Request]:
    """Every run of a mode, once: what is cheap and asked for most first, GNNExplainer last."""
    runs: list[Request] = []
    for kind in ("optimum", "auto"):
        runs += [replace(problem, kind=kind, budget=0) for _, problem in problems(mode)]
    has_table_5 = TABLE_5_NETWORK in mode.table_34
    if has_table_5:
        runs.append(Request("explanation", TABLE_5_NETWORK, buffer_kb=32))
    cells = [*_table_cells(mode), *ladder(mode), *curve(mode)]
    if has_table_5:
        base = Request("search", TABLE_5_NETWORK, buffer_kb=128, budget=2000 // mode.divide)
        for search in ("local", "random"):
            cells.append(replace(base, search=search, explainer="saliency"))
    judged: list[Request] = []
    if mode.data:
        judged = [Request("samples", "", scheme, granularity) for scheme, granularity in MODELS]
        judged.append(Request("predictors"))
    ranked = sorted((request for cell in cells for request in seeded(mode, cell)), key=_rank(mode))
    quick = [request for request in ranked if request.explainer != "gnnexplainer"]
    return list(dict.fromkeys([*runs, *quick, *judged, *ranked]))


def _table_cells(mode: Mode) -> Iterator[Request]:
    for table, problem in problems(mode):
        for search in searches_of(table, problem.scheme):
            for explainer in explainers_of(mode, search):
                yield replace(problem, kind="search", search=search, explainer=explainer)


def _rank(mode: Mode) -> Callable[[Request], tuple[float, ...]]:
    """Order of searches: the paper's LBDF, then BRR, then the second column."""

    def rank(cell: Request) -> tuple[float, ...]:
        # GNNExplainer trains per group, and random search asks for thousands of groups.
        slow = (1 + (cell.search == "random")) * (cell.explainer == "gnnexplainer")
        column = mode.granularities.index(cell.granularity) if cell.scheme == "lbdf" else 0.5
        return slow, column, cell.search == "random", cell.buffer_kb

    return rank


_SEARCH_MODULES = {
    "plain": ("benchmarks.reproduction.plain",),
    "plain-edits": ("benchmarks.reproduction.plain",),
    "local": ("torch_getfuse.partition.search.local",),
    "local-merged": ("torch_getfuse.partition.search.local",),
    "random": ("torch_getfuse.partition.search.random",),
    "nsga2": ("torch_getfuse.partition.search.nsga2",),
}
_WEIGHTS = {
    "rgexplainer": ("validity", "rg"),
    "pgexplainer": ("validity", "pg"),
    "gnnexplainer": ("validity",),
    "saliency": ("validity",),
}


def depends_on(request: Request, graph: str) -> dict[str, str]:
    """All that a run's figures depend on beside the request itself.

    Args:
        request: the run.
        graph: fingerprint of the network's operator graph; ``""`` where there is none.
    """
    modules: list[str] = [f"torch_getfuse.partition.cost.{request.scheme}.model"]
    found = {"protocol": str(PROTOCOL), "graph": graph}
    if request.kind == "search":
        modules += _SEARCH_MODULES[request.search]
        if request.search == "nsga2":
            found["libraries"] = provenance.versions("pymoo")
        if request.explainer != "none":
            modules.append("torch_getfuse.partition.search.recursive_split")
            found["rule"] = RULE
            # How many edges an explainer may blame is the planner's to say.
            found["ranker"] = provenance.function_digest("torch_getfuse.group_planner", "ranker_of")
        if request.explainer in _WEIGHTS:
            modules.append("torch_getfuse.explain.explainers")
            found["weights"] = provenance.weights_digest(
                request.scheme, request.granularity, *_WEIGHTS[request.explainer]
            )
    elif request.kind == "optimum":
        modules.append("torch_getfuse.partition.exact.down_sets")
    elif request.kind == "auto":
        modules.append("torch_getfuse.planner")
        if request.scheme == "brr":  # which the planner imports by name
            modules.append("torch_getfuse.partition.wide.tile_automaton")
    elif request.kind == "explanation":
        modules += ["torch_getfuse.explain_graph", "torch_getfuse.explain.explainers"]
        found["weights"] = provenance.weights_digest(
            "lbdf", request.granularity, "validity", "pg", "rg"
        )
    else:
        modules += ["torch_getfuse.explain.training.data", "torch_getfuse.partition.cost.registry"]
        if request.kind == "predictors":
            digests = [provenance.weights_digest(*model, "validity") for model in MODELS]
            found["weights"] = " ".join(digests)
    if "weights" in found:
        found["libraries"] = provenance.versions("torch", "torch_geometric")
    found["code"] = provenance.code_digest(*modules)
    return found


def key_of(request: Request, provenance_: dict[str, str]) -> str:
    """Equal for two runs exactly if they must give the same figures."""
    text = json.dumps([asdict(request), provenance_], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
