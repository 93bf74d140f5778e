"""Rules of recurrent layers and cells (docs/method.md, section 2).

A layer streams over its steps: an output step needs the input step of the same number, and the
state that the steps before have left. The state stays on chip as the weights do, and counts among
them, unless it is a feature map of its own. A layer that runs backwards too needs the whole
sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_getfuse.backend.rules.macs import recurrent_macs
from torch_getfuse.backend.rules.rule import (
    Call,
    OpRule,
    Reading,
    Run,
    Sample,
    Spec,
    Stored,
    operands_in,
    whole,
)
from torch_getfuse.backend.rules.view_windows import Access, All, Along

_Cell = Callable[[torch.Tensor, torch.Tensor | None, Any], torch.Tensor]
_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
_SEQUENCE = (5, 6)


def _kind(name: str) -> str:
    """``rnn`` for ``rnn_tanh``, ``rnn_tanh_cell``, ..."""
    return name.split("_")[0]


def _states(call: Call, weight: Stored, elements: int) -> tuple[list[Reading], Stored]:
    """Readings of a state that is a feature map; else the weights with its elements.

    A state of zeros, or one that the model keeps, is a constant, of as wide elements as the input.
    """
    given = [state for state in operands_in(call.args["hx"]) if not state.weight]
    if given:
        return [Reading(s, tuple(All() for _ in range(s.rank))) for s in given], weight
    width = call.args["input"].info.dtype.itemsize
    return [], weight + Stored(elements, elements * width)


def _layer(call: Call) -> Spec:
    """``lstm``, ``gru`` and ``rnn_*(input, hx, params, ...)``: results are steps, then states."""
    kind = _kind(call.name)
    operand, params = call.args["input"], call.args["params"]
    packed = not isinstance(params, Sequence) or "batch_sizes" in call.args
    if packed or operand.weight or not all(p.weight for p in params):
        reason = "steps of sequences of several lengths" if packed else "weights that are computed"
        told = f"{kind} over {reason}: it reads its whole inputs"
        known = None if packed else recurrent_macs(operand, params)
        return whole(call, kind, told, mixes=True, macs=known)
    macs = recurrent_macs(operand, params)
    both = bool(call.args["bidirectional"])
    time = 1 if call.args["batch_first"] else 0
    if operand.batch == time:
        told = f"the samples of the batch are the steps of the {kind}"
        return whole(call, kind, told, mixes=True, macs=macs)
    parts = len(params) // (int(call.args["num_layers"]) * (2 if both else 1))
    elements = 0
    for recurrent in params[1::parts]:
        rows, out = recurrent.shape
        # The cell state of an LSTM is as wide as a gate; its output may be projected.
        elements += out + (rows // _GATES[kind] if kind == "lstm" else 0)
    weights = Stored.sum(p.stored for p in params)
    states, weights = _states(call, weights, elements)
    steps = len(call.outputs) == 1 and call.picked == 0
    accesses: list[Access] = [Along(0), Along(1), All()]
    if not steps:
        # The last state, or all results as one unit: each step is taken in as it arrives.
        accesses = [Along(1), Along(1), All(reduce=True)]
        accesses[time] = All(reduce=True)
    if both:
        accesses[time] = All()
    return Spec(
        kind,
        (Reading(operand, tuple(accesses)), *states),
        mixes_channels=True,
        recurrent=True,
        weights=weights,
        stream_axis=time if steps else None,
        reason_if_whole=f"a bidirectional {kind} starts at both ends of the sequence",
        macs=macs,
    )


def _cell(call: Call) -> Spec:
    """One step: like linear layers of the input and of the state."""
    kind = f"{_kind(call.name)}_cell"
    operands = [call.args["input"], *operands_in(call.args["hx"])]
    joint = len(call.outputs) > 1
    reads = tuple(
        Reading(operand, None if joint else (Along(0), All(reduce=True)))
        for operand in operands
        if not operand.weight
    )
    macs = recurrent_macs(call.args["input"], [call.args["w_ih"], call.args["w_hh"]])
    return Spec(kind, reads, mixes_channels=True, macs=macs)


class _Steps(nn.Module):
    """A layer between two elementwise operators, of which only one result is used."""

    def __init__(self, layer: nn.RNNBase, result: str = "steps") -> None:
        super().__init__()
        self.layer, self.result = layer, result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps, state = self.layer(x.relu())
        if self.result == "steps":
            found: torch.Tensor = steps
        elif self.result == "state":
            found = (state[0] if isinstance(state, tuple) else state).transpose(0, 1)
        else:
            found = steps + state[:1].transpose(0, 1)
        return found.tanh()


class _Signal(_Steps):
    """The same of a signal ``(N, C, L)``, whose positions are the steps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.avg_pool1d(x, 1).transpose(1, 2))


def _loop(cell: _Cell) -> Callable[..., torch.Tensor]:
    """Two steps of a cell."""

    def run(x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return cell(y.tanh(), cell(x.tanh(), None, weights), weights)

    return run


def _gru_steps(x: torch.Tensor, hx: torch.Tensor | None, weights: Any) -> torch.Tensor:
    state = x.new_zeros(x.shape[0], 6) if hx is None else hx
    return torch.gru_cell(x, state, *weights)


def _tanh_steps(x: torch.Tensor, hx: torch.Tensor | None, weights: Any) -> torch.Tensor:
    state = x.new_zeros(x.shape[0], 6) if hx is None else hx
    return torch.rnn_tanh_cell(x, state, *weights)


def _lstm_step(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    zeros = x.new_zeros(x.shape[0], 6)
    hidden, state = torch.lstm_cell(x, (zeros, zeros), *weights)
    return hidden * state


_LAYER = (
    *("input", "hx", "params", "has_biases", "num_layers"),
    *("dropout", "training", "bidirectional", "batch_first"),
)
_CELL = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
_WEIGHTS = _CELL[2:]

RULES: tuple[OpRule, ...] = (
    OpRule(
        "lstm",
        ("lstm",),
        _layer,
        Sample(lambda: _Steps(nn.LSTM(6, 4, batch_first=True)), (_SEQUENCE,)),
        _LAYER,
        recurrent=True,
    ),
    OpRule(
        "gru",
        ("gru",),
        _layer,
        Sample(lambda: _Steps(nn.GRU(6, 4, 2, batch_first=True)), (_SEQUENCE,)),
        _LAYER,
        recurrent=True,
    ),
    OpRule(
        "rnn",
        ("rnn_tanh", "rnn_relu"),
        _layer,
        Sample(lambda: _Steps(nn.RNN(6, 4, batch_first=True, bias=False)), (_SEQUENCE,)),
        _LAYER,
        recurrent=True,
    ),
    OpRule(
        "lstm_cell",
        ("lstm_cell",),
        _cell,
        Sample(lambda: Run(_lstm_step, (24, 8), (24, 6), (24,), (24,)), ((8,),)),
        _CELL,
        weights=_WEIGHTS,
    ),
    OpRule(
        "gru_cell",
        ("gru_cell",),
        _cell,
        Sample(lambda: Run(_loop(_gru_steps), (18, 8), (18, 6), (18,), (18,)), ((8,), (8,))),
        _CELL,
        weights=_WEIGHTS,
    ),
    OpRule(
        "rnn_cell",
        ("rnn_tanh_cell", "rnn_relu_cell"),
        _cell,
        Sample(lambda: Run(_loop(_tanh_steps), (6, 8), (6, 6), (6,), (6,)), ((8,), (8,))),
        _CELL,
        weights=_WEIGHTS,
    ),
)
"""Recurrent layers and cells."""

EXTRA_SAMPLES: dict[str, Sample] = {
    "lstm of a signal": Sample(lambda: _Signal(nn.LSTM(6, 4, batch_first=True)), ((6, 9),)),
    "lstm of a signal, two ways": Sample(
        lambda: _Signal(nn.LSTM(6, 4, batch_first=True, bidirectional=True)), ((6, 9),)
    ),
    "gru of a signal, last state": Sample(
        lambda: _Signal(nn.GRU(6, 4, batch_first=True), "state"), ((6, 9),)
    ),
    "lstm, two ways": Sample(
        lambda: _Steps(nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True)), (_SEQUENCE,)
    ),
    "lstm, projected": Sample(
        lambda: _Steps(nn.LSTM(6, 4, proj_size=3, batch_first=True)), (_SEQUENCE,)
    ),
    "lstm, last state": Sample(
        lambda: _Steps(nn.LSTM(6, 4, batch_first=True), "state"), (_SEQUENCE,)
    ),
    "gru, last state": Sample(
        lambda: _Steps(nn.GRU(6, 4, batch_first=True), "state"), (_SEQUENCE,)
    ),
    "gru, steps and state": Sample(
        lambda: _Steps(nn.GRU(6, 4, batch_first=True), "both"), (_SEQUENCE,)
    ),
}
"""Further variants, for the conformance test."""
