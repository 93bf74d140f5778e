"""Rules of operators that are not torch's own: :func:`register_rule`.

They stand in the same table as torch's (:data:`~torch_getfuse.backend.rules.registry.BY_TARGET`).
A library's package may have them registered when one of its operators is met for the first time,
by an entry point (:data:`torch_getfuse.plugins.RULES`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch.library import CustomOpDef  # type: ignore[attr-defined]

from torch_getfuse.backend.rules.registry import BY_TARGET, find_rule
from torch_getfuse.backend.rules.rule import (
    Alias,
    Call,
    Operand,
    OpRule,
    Reading,
    RuleFunction,
    Spec,
    operands_in,
    pointwise_accesses,
    whole,
)
from torch_getfuse.backend.rules.view_windows import Access, All, Along
from torch_getfuse.backend.torch_private import (
    OpOverload,
    OpOverloadPacket,
    custom_op_name,
    qualified_name,
)
from torch_getfuse.errors import OptionError, nearest
from torch_getfuse.ir import Window, WindowKind

_ROWS = 2  # the axis of a map's rows; the columns follow


def register_rule(
    op: object,
    like: str | None = None,
    *,
    windows: Window | Mapping[str, Window] | None = None,
    mixes_channels: bool = False,
) -> None:
    """Say how an operator that is not torch's own reads its inputs.

    Without a rule an operator is taken to read all of its inputs before it writes anything. Either
    ``like`` or ``windows`` is given:

    .. code-block:: python

        torch_getfuse.register_rule(torch.ops.mylib.swish, like="silu")
        torch_getfuse.register_rule(
            torch.ops.mylib.blur, windows=Window.sliding((3, 3), padding=(1, 1))
        )

    A rule says nothing of how to run the operator. The depth-first executor calls one that is like
    an elementwise operator of torch, or that reads through identity windows, on blocks of rows, and
    compares with the whole; for any other one the group falls back to its FX nodes, and the ledger
    says so. Parameters and buffers among the arguments count as its weights. A second rule of one
    operator replaces the first; models that are compiled already keep theirs.

    Args:
        op: ``torch.ops.mylib.relu``, one of its overloads, what ``torch.library.custom_op`` made,
            a Python function that Dynamo leaves in the graph, or its full name (``"mylib::relu"``,
            ``"mymodule.relu"``).
        like: the ATen name of an operator of torch that reads alike (``"relu"``, ``"add"``,
            ``"conv2d"``). Its arguments are the same in order, or by name.
        windows: of all inputs that are feature maps, or by argument. Windows that slide, reduce or
            resize are of the rows and columns of maps of rank 4 ``(N, C, H, W)``.
        mixes_channels: with ``windows``: whether an output channel needs several input channels.

    Raises:
        OptionError: for what is no operator, for one of torch's that has a rule, for an unknown
            ``like`` and where both or neither of ``like`` and ``windows`` are given.
    """
    name = _name(op)
    known = BY_TARGET.get(name)
    if known is not None and known.is_torchs:
        raise OptionError(f"{name} is an operator of torch's own and has its rule")
    if (like is None) == (windows is None):
        raise OptionError(f"register_rule({name}) takes one of like= and windows=")
    if like is not None:
        model = find_rule(like)
        if model is None:
            raise OptionError(
                f"like={like!r} is no operator with a rule{nearest(str(like), BY_TARGET)}"
            )
        BY_TARGET[name] = _rule_like(name, like, model)
        return
    assert windows is not None
    for window in windows.values() if isinstance(windows, Mapping) else (windows,):
        if not isinstance(window, Window):
            raise OptionError(
                f"windows= of {name} has {window!r}; give Window.identity(), Window.sliding(...), "
                "Window.transposed(...), Window.resize(...), Window.reduce() or Window.whole()"
            )
    BY_TARGET[name] = OpRule(name, (name,), _windowed(windows, mixes_channels), None)


def _name(op: object) -> str:
    """The name under which capture meets an operator (``fx_nodes/normalize.py``)."""
    name = ""
    if isinstance(op, str):
        name = op
    elif isinstance(op, CustomOpDef):
        name = custom_op_name(op)
    elif isinstance(op, OpOverload):
        name = op.name().partition(".")[0]
    elif isinstance(op, OpOverloadPacket):
        name = qualified_name(op)
    if name:
        return name.removeprefix("aten::")
    if not callable(op) or not hasattr(op, "__qualname__"):
        raise OptionError(
            f"{op!r} is no operator; give torch.ops.mylib.relu, a function or its full name"
        )
    return f"{op.__module__}.{op.__qualname__}"


def _rule_like(name: str, like: str, model: OpRule) -> OpRule:
    """The rule of ``name`` with the facts of ``model``, but that it gives a tensor of its own."""

    def rule(call: Call) -> Spec | Alias:
        found = model.rule(replace(call, name=like, args=made.named(call.args)))
        if isinstance(found, Alias):
            return whole(call, call.name, f"{like} is a view here, and {call.name} is none")
        return replace(found, kind=call.name)

    made = replace(model, kind=name, targets=(name,), rule=rule, sample=None, like=like, view=None)
    return made


def _windowed(windows: Window | Mapping[str, Window], mixes_channels: bool) -> RuleFunction:
    def rule(call: Call) -> Spec:
        reads, slides = [], False
        for name, operand in _named(call):
            window = windows
            if isinstance(window, Mapping):
                found = window.get(name) or window.get("self" if name == "input" else name)
                if found is None:
                    return whole(
                        call, call.name, f"no window for {name!r} of {call.name}", macs=None
                    )
                window = found
            if wrong := _contradiction(window, operand, call):
                return whole(call, call.name, wrong, mixes=mixes_channels, macs=None)
            slides = slides or window.kind is not WindowKind.IDENTITY
            reads.append(Reading(operand, _accesses(window, operand, call, mixes_channels)))
        stream = _ROWS if slides and call.rank == 4 else None
        return Spec(
            call.name,
            tuple(reads),
            mixes_channels=mixes_channels,
            stream_axis=stream,
            macs=None,  # windows do not say what is done with what they show
        )

    return rule


def _named(call: Call) -> list[tuple[str, Operand]]:
    """The feature maps among the arguments, each under the name of its argument."""
    return [
        (name, operand)
        for name, value in call.args.items()
        for operand in operands_in(value)
        if not operand.weight
    ]


def _contradiction(window: Window, operand: Operand, call: Call) -> str:
    """Why a window cannot be the one of an operand; empty where it may be."""
    if window.everything and window.kind is WindowKind.WHOLE:
        return ""
    if window.kind is WindowKind.IDENTITY:
        pairs = zip(operand.shape[::-1], call.shape[::-1])
        if operand.rank > call.rank or any(i not in (1, o) for i, o in list(pairs)[:2]):
            return f"{call.name}: identity of {operand.shape} does not give {call.shape}"
        return ""
    if operand.rank != 4 or (call.rank != 4 and window.kind is not WindowKind.REDUCE):
        return f"{call.name}: {window} is for maps of rank 4, not {operand.shape}"
    for axis in (0, 1):
        implied = window.output_size(axis, operand.shape[_ROWS + axis])
        if implied is not None and implied != call.shape[_ROWS + axis]:
            return f"{call.name}: {window} of {operand.shape} does not give {call.shape}"
    return ""


def _accesses(
    window: Window, operand: Operand, call: Call, mixes_channels: bool
) -> tuple[Access, ...] | None:
    """A window as accesses, one per axis of the operand."""
    if window.kind is WindowKind.WHOLE:
        return None
    if window.kind is WindowKind.IDENTITY:
        accesses = list(pointwise_accesses(operand, call.rank))
    else:
        accesses = [Along(0), Along(1)]
    found: list[Access] = [*accesses]
    if mixes_channels and operand.rank > 1:
        found[1] = All()
    if window.kind is WindowKind.IDENTITY:
        return tuple(found)
    for axis in (0, 1):
        if window.kind is WindowKind.REDUCE:
            found.append(All(reduce=True))
        elif window.kind is WindowKind.RESIZE:
            found.append(Along(_ROWS + axis, kind=WindowKind.RESIZE))
        else:
            found.append(
                Along(
                    _ROWS + axis,
                    window.kernel[axis],
                    window.stride[axis],
                    window.dilation[axis],
                    window.padding[axis],
                    window.padding_end[axis],
                    window.kind,
                )
            )
    return tuple(found)
