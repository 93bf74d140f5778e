"""Schedules of Arm's Vela, the compiler for Ethos-U (``pip install ethos-u-vela``).

``vela --verbose-schedule --verbose-performance NETWORK.tflite`` prints a schedule and writes
``NETWORK_per-layer.csv`` into its output folder. The schedule numbers its operations, with the
memory of each output (``in Sram``, ``in Dram``) and its *cascade*: operations of one number other
than 0 run stripe by stripe, one after another. The table has the TFLite name of each operation's
output, in the same order. Both forms are those of Vela 5.2.0.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch_getfuse.errors import OptionError
from torch_getfuse.importers.names import matched, with_fused
from torch_getfuse.ir import OpGraph

_OPERATION = re.compile(r"^\t(\d+): Operation (\S+) +- OFM ([\d, ]+) \(in (\w+)\)")
_CASCADE = re.compile(r"^\t\tAssigned Cascade = (\d+)")
_WEIGHTS = re.compile(r"^\t\tEncoded Weights = (\d+) bytes")
_INSIDE = re.compile(r"^\t\tsub-operations: (?:-|\[ (.*) \])")


@dataclass(frozen=True)
class VelaOperation:
    """One operation of a schedule.

    Attributes:
        kind: Vela's word, such as ``"DepthwiseConv2D"``.
        inside: operations that are fused into it, such as ``"Relu6"``.
        shape: of its output, in NHWC.
        memory: of its output: ``"Sram"`` or ``"Dram"``.
        cascade: 0: it runs alone.
        weights: bytes of its encoded weights.
        name: the TFLite name of its output.
    """

    kind: str
    inside: tuple[str, ...]
    shape: tuple[int, ...]
    memory: str
    cascade: int
    weights: int
    name: str


def read_schedule(schedule: str, per_layer: str) -> list[VelaOperation]:
    """The operations of a schedule, in the order in which they run.

    Args:
        schedule: what Vela printed.
        per_layer: the text of the table.

    Raises:
        OptionError: where the two are not of one run, or not in the form of Vela 5.2.0.
    """
    found: list[dict[str, object]] = []
    for line in schedule.splitlines():
        if match := _OPERATION.match(line):
            found.append(
                {
                    "kind": match[2],
                    "shape": tuple(int(size) for size in match[3].split(",")),
                    "memory": match[4],
                    "cascade": 0,
                    "weights": 0,
                    "inside": (),
                }
            )
        elif found and (match := _CASCADE.match(line)):
            found[-1]["cascade"] = int(match[1])
        elif found and (match := _WEIGHTS.match(line)):
            found[-1]["weights"] = int(match[1])
        elif found and (match := _INSIDE.match(line)):
            found[-1]["inside"] = tuple(re.split(r"[, ]+", match[1])) if match[1] else ()
    if not found:
        raise OptionError(
            "no schedule in what Vela printed; run it with --verbose-schedule (Vela 5.2.0)"
        )
    rows = list(csv.DictReader(io.StringIO(per_layer)))
    if not rows or not {"NNG Operator", "Name"} <= rows[0].keys():
        raise OptionError(
            "the table has no columns 'NNG Operator' and 'Name'; give *_per-layer.csv"
        )
    operations, at = [], 0
    for k, fields in enumerate(found):
        inside = fields["inside"]
        assert isinstance(inside, tuple)
        mine = rows[at : at + 1 + len(inside)]
        kinds = [row["NNG Operator"] for row in mine]
        if kinds != [fields["kind"], *inside]:
            raise OptionError(
                f"operation {k} of the schedule is {fields['kind']} with {list(inside)}, row {at} "
                f"of the table has {kinds}; are they of one run of Vela 5.2.0?"
            )
        at += len(mine)
        operations.append(VelaOperation(name=mine[-1]["Name"], **fields))  # type: ignore[arg-type]
    if at != len(rows):
        raise OptionError(f"the schedule ends at row {at} of the table, which has {len(rows)}")
    return operations


def vela_groups(
    graph: OpGraph,
    schedule: str | Path,
    per_layer: str | Path,
    names: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """The cascades of a schedule as groups of operators, in the order in which they run.

    An operation outside of cascades is a group by itself, with what is fused into it.

    Args:
        graph: the operator graph of the same network.
        schedule: file of what Vela printed.
        per_layer: the file ``*_per-layer.csv``.
        names: TFLite name -> operator, where they differ.

    Raises:
        OptionError: for files that are no schedule, and for names that stand for no operator.
    """
    operations = read_schedule(
        Path(schedule).read_text(encoding="utf-8"), Path(per_layer).read_text(encoding="utf-8")
    )
    return cascades(graph, operations, names)


def cascades(
    graph: OpGraph, operations: list[VelaOperation], names: Mapping[str, str] | None = None
) -> list[list[str]]:
    """The same of operations that are read."""
    groups: list[list[str]] = []
    last = 0
    for operation in operations:
        if not operation.cascade or operation.cascade != last:
            groups.append([])
        groups[-1].append(operation.name)
        last = operation.cascade
    known = names or {}
    found = matched(graph, groups, lambda name: known.get(name, name))
    return with_fused(graph, found)
