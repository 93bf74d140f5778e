"""An int8 TFLite file of an operator graph, for :mod:`vela`.

    python benchmarks/_tflite.py PLAN.json OUT.tflite

The file has the operators, shapes and strides of the plan's graph, in NHWC, with random weights of
a fixed seed. Each TFLite operator is named after the operator of the graph whose tensor it writes.
An activation that TFLite convolutions have built in (ReLU, ReLU6) is fused into the one before it.
Without TensorFlow: by flatbuffers and the schema that comes with Vela. Imports neither torch nor
this package, for Vela may live in an environment of its own.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np

SAME, VALID = 0, 1
INT8, INT32 = 9, 2
CODES = {
    "ADD": 0,
    "AVERAGE_POOL_2D": 1,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 4,
    "FULLY_CONNECTED": 9,
    "LOGISTIC": 14,
    "MAX_POOL_2D": 17,
    "MUL": 18,
    "RELU": 19,
    "RELU6": 21,
    "RESHAPE": 22,
    "HARD_SWISH": 117,
}
OPTIONS = {
    "CONV_2D": (1, "Conv2DOptions"),
    "DEPTHWISE_CONV_2D": (2, "DepthwiseConv2DOptions"),
    "AVERAGE_POOL_2D": (5, "Pool2DOptions"),
    "MAX_POOL_2D": (5, "Pool2DOptions"),
    "FULLY_CONNECTED": (8, "FullyConnectedOptions"),
    "ADD": (11, "AddOptions"),
    "RESHAPE": (17, "ReshapeOptions"),
    "MUL": (21, "MulOptions"),
    "HARD_SWISH": (77, "HardSwishOptions"),
}
FUSED = {"relu": 1, "relu6": 3}
# TFLite has no hard sigmoid: a sigmoid is one table look-up as well, over a map of one position.
UNARY = {"hardswish": "HARD_SWISH", "hardsigmoid": "LOGISTIC", "relu": "RELU", "relu6": "RELU6"}
BINARY = {"add": "ADD", "mul": "MUL"}


def schema(name: str) -> Any:
    """A table of the TFLite schema that comes with Vela."""
    return importlib.import_module(f"ethosu.vela.tflite.{name}")


class Writer:
    """Builds one file from the ``graph`` of a plan file."""

    def __init__(self, graph: dict[str, Any], seed: int = 0) -> None:
        self.graph = graph
        self.rng = np.random.default_rng(seed)
        self.builder = flatbuffers.Builder(1 << 20)
        self.buffers: list[bytes] = [b""]
        self.tensors: list[dict[str, Any]] = []
        self.number: dict[str, int] = {}
        self.operators: list[dict[str, Any]] = []

    # -- the graph ------------------------------------------------------------------------

    def add_graph(self) -> None:
        """All operators, each activation that can be in the one that makes its input."""
        readers: dict[str, list[str]] = {}
        for op in self.graph["ops"]:
            for read in op["reads"]:
                readers.setdefault(read["tensor"], []).append(op["name"])
        for name in self.graph["inputs"]:
            self.number[name] = self.activation(name, self.graph["tensors"][name]["shape"])
        by_name = {op["name"]: op for op in self.graph["ops"]}
        inside: set[str] = set()
        for op in self.graph["ops"]:
            if op["name"] in inside:
                continue
            fused, target = 0, op["writes"]
            after = readers.get(op["writes"], [])
            if len(after) == 1 and op["kind"] in ("conv2d", "linear", "add"):
                next_ = by_name[after[0]]
                if next_["kind"] in FUSED and op["writes"] not in self.graph["outputs"]:
                    fused, target = FUSED[next_["kind"]], next_["writes"]
                    inside.add(next_["name"])
            self.add(op, target, fused)

    def add(self, op: dict[str, Any], target: str, fused: int) -> None:
        """One operator that writes the tensor ``target``."""
        kind = op["kind"]
        sources = [self.number[read["tensor"]] for read in op["reads"]]
        shape = self.graph["tensors"][target]["shape"]
        output = self.number[target] = self.activation(target, shape)
        if kind == "conv2d":
            self.convolution(op, sources[0], output, fused)
        elif kind == "linear":
            features = int(np.prod(self.tensors[sources[0]]["shape"][1:]))
            flat = self.tensor(f"{op['name']}/flat", (1, features), INT8)
            new = self.tensor(f"{op['name']}/shape", (2,), INT32, np.array([1, features], "<i4"))
            self.operator("RESHAPE", [sources[0], new], flat, {})
            weights = self.weights(op["name"], (shape[1], features), 0)
            bias = self.bias(op["name"], shape[1])
            options = {"FusedActivationFunction": fused}
            self.operator("FULLY_CONNECTED", [flat, weights, bias], output, options)
        elif kind in ("adaptive_avg_pool2d", "max_pool2d"):
            _, height, width, _ = self.tensors[sources[0]]["shape"]
            window = op["reads"][0]["window"]
            if window == "reduce":
                window = {"kernel": [height, width], "stride": [1, 1], "padding": [0, 0]}
            options = {
                **self.sliding(window, (height, width), self.tensors[output]["shape"][1:3]),
                "FilterHeight": window["kernel"][0],
                "FilterWidth": window["kernel"][1],
            }
            name = "MAX_POOL_2D" if kind == "max_pool2d" else "AVERAGE_POOL_2D"
            self.operator(name, sources, output, options)
        elif kind in UNARY:
            self.operator(UNARY[kind], sources, output, {})
        elif kind in BINARY:
            self.operator(BINARY[kind], sources, output, {"FusedActivationFunction": fused})
        else:
            raise SystemExit(
                f"{op['name']}: no TFLite operator for {kind!r}; add one to {__file__}"
            )

    def convolution(self, op: dict[str, Any], source: int, output: int, fused: int) -> None:
        _, height, width, channels = self.tensors[source]["shape"]
        _, *size, made = self.tensors[output]["shape"]
        window = op["reads"][0]["window"]
        if not isinstance(window, dict):  # 1x1; over a map of one position "reduce" is the same
            window = {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0]}
        groups = op.get("groups", 1)
        options = {**self.sliding(window, (height, width), size), "FusedActivationFunction": fused}
        bias = self.bias(op["name"], made)
        if groups == 1:
            weights = self.weights(op["name"], (made, *window["kernel"], channels), 0)
            self.operator("CONV_2D", [source, weights, bias], output, options)
        elif groups == channels == made:
            weights = self.weights(op["name"], (1, *window["kernel"], made), 3)
            options["DepthMultiplier"] = 1
            self.operator("DEPTHWISE_CONV_2D", [source, weights, bias], output, options)
        else:
            raise SystemExit(
                f"{op['name']}: {groups} groups of {channels} channels are not TFLite's"
            )

    @staticmethod
    def sliding(window: dict[str, Any], size: Any, made: Any) -> dict[str, int]:
        """Strides and the padding with which TFLite makes a map of the same size."""
        stride = window["stride"]
        if any(window["padding"]):
            assert all(-(-n // s) == m for n, s, m in zip(size, stride, made)), window
        padding = SAME if any(window["padding"]) else VALID
        return {"Padding": padding, "StrideH": stride[0], "StrideW": stride[1]}

    # -- tensors --------------------------------------------------------------------------

    def activation(self, name: str, shape: Any) -> int:
        """A feature map in NHWC; values of one byte, with one scale."""
        if len(shape) == 4:
            shape = (shape[0], *shape[2:], shape[1])
        return self.tensor(name, shape, INT8, scales=[0.05], zeros=[-3])

    def weights(self, name: str, shape: Any, axis: int) -> int:
        values = np.clip(np.rint(self.rng.normal(0, 32, shape)), -127, 127).astype("i1")
        count = shape[axis]
        scales = [0.001] * count
        return self.tensor(f"{name}/w", shape, INT8, values, scales, [0] * count, axis)

    def bias(self, name: str, count: int) -> int:
        values = self.rng.integers(-1000, 1000, count).astype("<i4")
        scales = [0.05 * 0.001] * count
        return self.tensor(f"{name}/b", (count,), INT32, values, scales, [0] * count)

    def tensor(
        self,
        name: str,
        shape: Any,
        kind: int,
        values: Any = None,
        scales: Any = (),
        zeros: Any = (),
        axis: int = 0,
    ) -> int:
        buffer = 0
        if values is not None:
            self.buffers.append(values.tobytes())
            buffer = len(self.buffers) - 1
        elif kind == INT8 and not scales:
            scales, zeros = [0.05], [-3]
        self.tensors.append(
            {
                "name": name,
                "shape": tuple(map(int, shape)),
                "type": kind,
                "buffer": buffer,
                "scales": scales,
                "zeros": zeros,
                "axis": axis,
            }
        )
        return len(self.tensors) - 1

    def operator(self, code: str, inputs: list[int], output: int, options: dict[str, int]) -> None:
        self.operators.append(
            {"code": code, "inputs": inputs, "output": output, "options": options}
        )

    # -- the file -------------------------------------------------------------------------

    def table(self, name: str, **fields: Any) -> int:
        """A table of the schema."""
        module = schema(name)
        getattr(module, f"{name}Start")(self.builder)
        for field, value in fields.items():
            getattr(module, f"{name}Add{field}")(self.builder, value)
        return int(getattr(module, f"{name}End")(self.builder))

    def offsets(self, items: list[int]) -> int:
        self.builder.StartVector(4, len(items), 4)
        for item in reversed(items):
            self.builder.PrependUOffsetTRelative(item)
        return int(self.builder.EndVector())

    def numbers(self, items: Any, kind: str) -> int:
        return int(self.builder.CreateNumpyVector(np.asarray(items, kind)))

    def bytes(self) -> bytes:
        """The whole file."""
        b = self.builder
        codes = list(dict.fromkeys(op["code"] for op in self.operators))
        buffers = []
        for data in self.buffers:
            fields = {"Data": b.CreateByteVector(data)} if data else {}
            buffers.append(self.table("Buffer", **fields))
        tensors = []
        for t in self.tensors:
            name, shape = b.CreateString(t["name"]), self.numbers(t["shape"], "<i4")
            fields = {}
            if len(t["scales"]):
                scale, zero = self.numbers(t["scales"], "<f4"), self.numbers(t["zeros"], "<i8")
                fields["Quantization"] = self.table(
                    "QuantizationParameters",
                    Scale=scale,
                    ZeroPoint=zero,
                    QuantizedDimension=t["axis"],
                )
            tensors.append(
                self.table(
                    "Tensor", Shape=shape, Type=t["type"], Buffer=t["buffer"], Name=name, **fields
                )
            )
        operators = []
        for op in self.operators:
            fields = {}
            if op["code"] in OPTIONS:
                kind, table = OPTIONS[op["code"]]
                fields = {
                    "BuiltinOptionsType": kind,
                    "BuiltinOptions": self.table(table, **op["options"]),
                }
            inputs, outputs = self.numbers(op["inputs"], "<i4"), self.numbers([op["output"]], "<i4")
            operators.append(
                self.table(
                    "Operator",
                    OpcodeIndex=codes.index(op["code"]),
                    Inputs=inputs,
                    Outputs=outputs,
                    **fields,
                )
            )
        opcodes = [
            self.table(
                "OperatorCode",
                DeprecatedBuiltinCode=CODES[code],
                BuiltinCode=CODES[code],
                Version=1,
            )
            for code in codes
        ]
        graph = self.table(
            "SubGraph",
            Tensors=self.offsets(tensors),
            Inputs=self.numbers([self.number[n] for n in self.graph["inputs"]], "<i4"),
            Outputs=self.numbers([self.number[n] for n in self.graph["outputs"]], "<i4"),
            Operators=self.offsets(operators),
        )
        model = self.table(
            "Model",
            Version=3,
            OperatorCodes=self.offsets(opcodes),
            Subgraphs=self.offsets([graph]),
            Buffers=self.offsets(buffers),
        )
        b.Finish(model, file_identifier=b"TFL3")
        return bytes(b.Output())


def main() -> None:
    plan, out = map(Path, sys.argv[1:3])
    writer = Writer(json.loads(plan.read_text(encoding="utf-8"))["graph"])
    writer.add_graph()
    out.write_bytes(writer.bytes())


if __name__ == "__main__":
    main()
