"""Groups of other tools as groups of operators."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from tests.graphs import Builder
from tests.partition.test_pins import chain
from torch_getfuse.errors import OptionError
from torch_getfuse.importers.names import matched, with_fused
from torch_getfuse.importers.onnx_nodes import onnx_groups
from torch_getfuse.importers.vela import read_schedule, vela_groups
from torch_getfuse.ir import OpGraph

# Two convolutions with what is fused into them in one cascade, one that runs alone, and a table
# look-up in the last: lines of what Vela 5.2.0 printed, with the names of `chain`.
SCHEDULE = """\
Schedule: 'graph_MIN_BUFFERED'
\t0: Operation Conv2D  - OFM 1, 16, 16, 4 (in Sram)
\t\tTime index = 0
\t\tAssigned Cascade = 1
\t\tEncoded Weights = 1424 bytes
\t\tsub-operations: [ Relu6 ]
\t1: Operation Conv2D  - OFM 1, 16, 16, 4 (in Dram)
\t\tAssigned Cascade = 1
\t\tEncoded Weights = 672 bytes
\t\tsub-operations: [ Relu6 ]
\t2: Operation Conv2D  - OFM 1, 16, 16, 4 (in Sram)
\t\tAssigned Cascade = 0
\t\tEncoded Weights = 640 bytes
\t\tsub-operations: -
\t3: Operation Add  - OFM 1, 16, 16, 4 (in Sram)
\t\tAssigned Cascade = 0
\t\tsub-operations: -
\t4: Operation Conv2D  - OFM 1, 16, 16, 4 (in Dram)
\t\tAssigned Cascade = 0
\t\tEncoded Weights = 640 bytes
\t\tsub-operations: [ LUT ]
\tCascades:
\t\t1: 0 -> 1, size: 224672
"""
TABLE = """\
Original Operator,NNG Operator,Target,Name
Conv2D,Conv2D,NPU,act1
Conv2D,Relu6,NPU,act1
Conv2D,Conv2D,NPU,act3
Conv2D,Relu6,NPU,act3
Conv2D,Conv2D,NPU,conv4
Add,Add,NPU,act5
Conv2D,Conv2D,NPU,act7
HardSwish,LUT,NPU,act7
"""


def test_cascades_are_groups(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text(SCHEDULE)
    (tmp_path / "net_per-layer.csv").write_text(TABLE)
    found = vela_groups(chain(), tmp_path / "out.txt", tmp_path / "net_per-layer.csv")
    assert found == [["conv0", "act1", "conv2", "act3"], ["conv4"], ["act5"], ["conv6", "act7"]]
    (tmp_path / "net_per-layer.csv").write_text(TABLE.replace("act3", "Relu6_7"))
    with pytest.raises(OptionError, match="1 names stand for no operator of the graph: Relu6_7"):
        vela_groups(chain(), tmp_path / "out.txt", tmp_path / "net_per-layer.csv")
    assert found == vela_groups(
        chain(), tmp_path / "out.txt", tmp_path / "net_per-layer.csv", {"Relu6_7": "act3"}
    )


def test_a_schedule_has_memories_and_weights() -> None:
    operations = read_schedule(SCHEDULE, TABLE)
    assert [operation.memory for operation in operations] == [
        "Sram",
        "Dram",
        "Sram",
        "Sram",
        "Dram",
    ]
    assert [operation.weights for operation in operations] == [1424, 672, 640, 0, 640]
    assert operations[0].inside == ("Relu6",)
    assert operations[0].shape == (1, 16, 16, 4)


@pytest.mark.parametrize(
    ("schedule", "table", "told"),
    [
        ("", TABLE, "no schedule in what Vela printed"),
        (SCHEDULE, "a,b\n1,2\n", "no columns 'NNG Operator' and 'Name'"),
        (SCHEDULE, TABLE.replace("Add,Add", "Mul,Mul"), r"operation 3 .* is Add .* \['Mul'\]"),
        (SCHEDULE, TABLE + "Add,Add,NPU,more\n", "ends at row 8 of the table, which has 9"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule: str, table: str, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        read_schedule(schedule, table)


def test_an_operator_that_groups_divide_is_told() -> None:
    graph, stands_for = chain(), {"Sigmoid": "act1", "Mul": "act1", "Conv": "conv0"}
    assert matched(graph, [["Conv", "Sigmoid", "Mul"]], stands_for.get) == [["conv0", "act1"]]
    with pytest.raises(OptionError, match=r"act1 \(act\) is one operator .* 'Sigmoid' .* 'Mul'"):
        matched(graph, [["Conv", "Sigmoid"], ["Mul"]], stands_for.get)


def test_what_has_two_readers_is_fused_into_neither() -> None:
    build = Builder()
    a = build.conv(build.input((1, 2, 4, 4)), 2)
    build.add(build.act(a), a)
    assert with_fused(build.graph(), [["add2"]]) == [["act1", "add2"]]


def modules(graph: OpGraph) -> OpGraph:
    """The operators as of modules ``m.conv0``, ``m.act1``, ..."""
    from dataclasses import replace

    return replace(graph, ops=tuple(replace(op, module=f"m.{op.name}") for op in graph))


def test_onnx_nodes_by_their_names() -> None:
    graph = modules(chain())
    groups = [["/m/m.conv0/Conv", "/m/m.act1/Sigmoid", "/m/m.act1/Mul"], ["/m/m.conv2/Conv_1"]]
    assert onnx_groups(graph, groups) == [["conv0", "act1"], ["conv2"]]
    assert onnx_groups(graph, [["/m/m.bn/BatchNormalization", "/m/m.conv0/Conv"]]) == [["conv0"]]
    with pytest.raises(OptionError, match=r"1 names stand for no operator .*: /m/m\.other/Conv"):
        onnx_groups(graph, [["/m/m.other/Conv"]])


def test_onnx_nodes_by_their_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's exporter writes it: a folded batch norm's scope, and the operator's weight."""

    def node(name: str, kind: str, inputs: list[str], scopes: list[str]) -> types.SimpleNamespace:
        entry = types.SimpleNamespace(key="pkg.torch.onnx.name_scopes", value=repr(scopes))
        return types.SimpleNamespace(name=name, op_type=kind, input=inputs, metadata_props=[entry])

    nodes = [
        node("n0", "Conv", ["x", "m.conv0.weight"], ["", "m", "m.bn", "batch_norm"]),
        node("n1", "Sigmoid", ["t"], ["", "m", "m.act1", "silu"]),
        node("n2", "Mul", ["t", "s"], ["", "m", "m.act1", "silu"]),
    ]
    model = types.SimpleNamespace(graph=types.SimpleNamespace(node=nodes))
    onnx = types.SimpleNamespace(load=lambda path, load_external_data: model)
    monkeypatch.setitem(sys.modules, "onnx", onnx)
    found = onnx_groups(modules(chain()), [["n0", "n1", "n2"]], "net.onnx")
    assert found == [["conv0", "act1"]]
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(OptionError, match="needs onnx: pip install onnx"):
        onnx_groups(modules(chain()), [["n0"]], "net.onnx")
