"""The figures that arXiv 2501.00636 prints, as printed: DRAM access in MB, rates, seconds."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.reproduction.onnx_operators import SUFFIX

Column = Mapping[str, float]
"""Network -> MB of DRAM access."""


def _columns(networks: tuple[str, ...], rows: Mapping[str, str]) -> dict[str, Column]:
    return {
        explainer: dict(zip(networks, map(float, row.split(" / ")), strict=True))
        for explainer, row in rows.items()
    }


TABLE_2_NETWORKS = ("efficientnet_b3", "resnet152", "deeplabv3_mobilenet_v3_large")
"""At 300, 224 and 513 pixels per side."""

TABLE_2: Mapping[str, Mapping[str, Column]] = {
    "local": _columns(
        TABLE_2_NETWORKS,
        {
            "none": "90.500 / 80.733 / 116.644",
            "gnnexplainer": "78.007 / 74.461 / 114.440",
            "pgexplainer": "73.569 / 76.421 / 114.180",
            "rgexplainer": "78.433 / 75.245 / 113.942",
        },
    ),
    "nsga2": _columns(
        TABLE_2_NETWORKS,
        {
            "none": "77.334 / 77.205 / 114.351",
            "gnnexplainer": "61.265 / 68.581 / 113.602",
            "pgexplainer": "61.792 / 67.013 / 113.840",
            "rgexplainer": "61.535 / 66.621 / 113.602",
        },
    ),
    "random": _columns(
        TABLE_2_NETWORKS,
        {
            "none": "172.802 / 113.661 / 148.153",
            "gnnexplainer": "169.928 / 96.021 / 143.925",
            "pgexplainer": "164.086 / 96.413 / 142.548",
            "rgexplainer": "162.774 / 94.453 / 147.022",
        },
    ),
}
"""Search -> explainer -> network; LBDF, 256 KB, 5,000 plans."""

TABLE_34_NETWORKS = ("mobilenet_v2", "vgg16", "resnet50", "resnet18", "squeezenet1_0")

TABLE_34: Mapping[tuple[str, str], Mapping[str, Column]] = {
    ("local", "brr"): _columns(
        TABLE_34_NETWORKS,
        {
            "none": "15.101 / 27.606 / 83.685 / 27.127 / 8.202",
            "gnnexplainer": "13.401 / 27.415 / 83.344 / 27.127 / 6.232",
            "pgexplainer": "14.609 / 26.975 / 83.493 / 26.975 / 6.790",
            "rgexplainer": "13.790 / 27.174 / 83.317 / 27.127 / 7.714",
        },
    ),
    ("local", "lbdf"): _columns(
        TABLE_34_NETWORKS,
        {
            "none": "9.803 / 5.973 / 25.764 / 5.974 / 3.839",
            "gnnexplainer": "8.823 / 5.973 / 24.588 / 5.974 / 3.585",
            "pgexplainer": "9.068 / 5.973 / 24.588 / 5.974 / 3.585",
            "rgexplainer": "8.823 / 5.973 / 24.196 / 5.974 / 3.585",
        },
    ),
    ("random", "brr"): _columns(
        TABLE_34_NETWORKS,
        {
            "none": "16.195 / 29.274 / 91.866 / 28.525 / 10.249",
            "gnnexplainer": "12.593 / 28.593 / 91.669 / 27.919 / 8.258",
            "pgexplainer": "13.307 / 28.124 / 91.763 / 27.599 / 7.817",
            "rgexplainer": "12.838 / 28.847 / 92.376 / 28.081 / 7.601",
        },
    ),
    ("random", "lbdf"): _columns(
        TABLE_34_NETWORKS,
        {
            "none": "13.209 / 6.856 / 39.092 / 6.856 / 10.080",
            "gnnexplainer": "11.432 / 6.268 / 35.564 / 6.464 / 7.948",
            "pgexplainer": "13.049 / 6.562 / 32.820 / 6.562 / 7.751",
            "rgexplainer": "12.890 / 6.464 / 32.036 / 6.464 / 7.333",
        },
    ),
}
"""(search, scheme) -> explainer -> network; 128 KB, 2,000 plans. Table III is local search,
Table IV random search."""

TABLE_5: Mapping[tuple[str, str], tuple[float, float]] = {
    ("local", "gnnexplainer"): (83.1, 168),
    ("local", "pgexplainer"): (59.1, 72),
    ("local", "rgexplainer"): (94.0, 99),
    ("random", "gnnexplainer"): (72.1, 106),
    ("random", "pgexplainer"): (50.7, 32),
    ("random", "rgexplainer"): (91.4, 42),
}
"""(search, explainer) -> rectify rate in percent, seconds; MobileNetV2, LBDF."""

ACCURACY = 95.0
"""Accuracy and F1 of the validity predictors are above this, in percent."""


def column(search: str, scheme: str, network: str) -> Mapping[str, float]:
    """Explainer -> MB of one column, baseline row ``"none"``; empty where the paper has none.

    The plain local search is another reading of the paper's, so it has the same column; so has a
    network with the operators of ONNX.
    """
    network = network.removesuffix(SUFFIX)
    search = "local" if search == "plain" else search
    table = TABLE_2.get(search, {}) if network in TABLE_2_NETWORKS and scheme == "lbdf" else {}
    table = table or TABLE_34.get((search, scheme), {})
    return {name: row[network] for name, row in table.items() if network in row}
