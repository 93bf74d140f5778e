"""Operator -> kernel that computes it by rows (:mod:`kernels`)."""

from __future__ import annotations

from torch_getfuse.backend.capture.capture import Capture
from torch_getfuse.backend.fx_nodes.normalize import normalise
from torch_getfuse.backend.rowwise import joining_kernels, reduction_kernels, spatial_kernels
from torch_getfuse.backend.rowwise.calls import NoRowKernel
from torch_getfuse.backend.rowwise.kernels import (
    Accumulator,
    CallKernel,
    RowKernel,
    Site,
    WholeKernel,
)
from torch_getfuse.backend.rowwise.operand_views import is_base
from torch_getfuse.backend.rules.registry import UNKNOWN, facts_of, positional
from torch_getfuse.backend.rules.rule import FLATTENED, MIXES_SAMPLES, OpRule
from torch_getfuse.ir import Op, WindowKind

_OF_MEMORY = {"as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter"}


def make_kernel(capture: Capture, op: Op) -> RowKernel | Accumulator:
    """The kernel of an operator.

    Args:
        capture: in whose graph the operator's nodes are.
        op: the operator.

    Raises:
        NoRowKernel: where it cannot be computed by rows or whole; says which operator and why.
    """
    calls = capture.calls.get(op.name)
    if not calls:
        raise NoRowKernel(f"{op.name} ({op.kind}) writes into a part of a tensor in place")
    name = normalise(calls[0].node, positional).name
    if name in _OF_MEMORY:
        raise NoRowKernel(
            f"{op.name} ({op.kind}) reads memory by strides, wherever its input's elements are"
        )
    rule = facts_of(name)
    site = Site(capture, op, calls[0], calls[1:], rule.broadcasts)
    shown = capture.views.get(calls[-1].node)
    if shown is not None and not is_base(capture, shown):
        raise NoRowKernel(
            f"{op.name} ({op.kind}) gives its rows in another shape than they are stored in, "
            "which no kernel computes"
        )
    if capture.samples > 1:
        _refuse_mixing(site, rule)
    reads = range(len(op.reads))
    if rule.recurrent and (site.target.rows > 1 or any(site.source(k).rows > 1 for k in reads)):
        raise NoRowKernel(
            f"{op.name} ({op.kind}) carries a state from row to row, which no kernel keeps"
        )
    if rule is not UNKNOWN and not rule.is_torchs:
        by_number = WindowKind.IDENTITY, WindowKind.WHOLE
        if any(read.window.kind not in by_number for read in op.reads):
            raise NoRowKernel(
                f"{op.name} ({op.kind}) is not torch's own: its rule says what it reads, not how "
                "to compute it by rows"
            )
    if any(op.reads[k].window.kind is WindowKind.REDUCE and site.held(k) for k in reads):
        return reduction_kernels.make(site, name)
    spatial = spatial_kernels.make(site, name)
    if spatial is not None:
        return spatial
    joining = joining_kernels.make(site, name)
    if joining is not None:
        return joining
    held = [site.held(k) for k in reads]
    if all(held) or (any(held) and not site.broadcasts):
        if not all(held) and any(site.source(k).rows > 1 for k in reads if not held[k]):
            raise NoRowKernel(f"{op.name} ({op.kind}) needs all of one input for a row of another")
        return WholeKernel(site)
    itself = {view.tensor for _, view in calls[0].operands if is_base(capture, view)}
    for k in reads:
        window = op.reads[k].window
        # Views that join or cut rows have such windows too, and are put through as they are.
        taps = window.kernel[0] > 1 or window.kind is WindowKind.TRANSPOSED
        if not held[k] and site.source(k).rows > 1 and taps and op.reads[k].tensor in itself:
            raise NoRowKernel(
                f"{op.name} ({op.kind}) has a {window} window, and no kernel that slides"
            )
    operands = site.operands()
    if all(operand.axis is None for operand in operands) and site.target.rows > 1:
        return WholeKernel(site)
    return CallKernel(site, operands)


def _refuse_mixing(site: Site, rule: OpRule) -> None:
    """Image by image, an operator must give each sample what it gives in the batch."""
    what = f"{site.op.name} ({site.op.kind})"
    if site.op.reason.startswith("no rule"):
        raise NoRowKernel(f"{what} has no rule, and may mix the samples of a batch")
    if site.op.reason.endswith((MIXES_SAMPLES, FLATTENED)):
        raise NoRowKernel(f"{what}: {site.op.reason}")
    views = [view for _, view in site.core.operands]
    args = normalise(site.core.node, positional).args
    if rule.kind == "batch_norm" and (args.get("training") or args.get("running_mean") is None):
        raise NoRowKernel(f"{what} takes its statistics over the batch")
    dims = args["dims"] if "dims" in args else reduction_kernels.axes_of(args)
    for dim in dims if isinstance(dims, (list, tuple)) else (dims,):
        rank = len(views[0].layout.axes)  # a scalar takes 0 and -1 for the axis that it lacks
        if isinstance(dim, int) and rank and views[0].batch == dim % rank:
            raise NoRowKernel(f"{what} runs along the batch")
    if rule.product:
        alone = len(views) == 1 or all(v.batch == 0 and len(v.layout.axes) > 2 for v in views)
        if not rule.batched or not alone:
            raise NoRowKernel(
                f"{what} multiplies whole tensors, and may mix the samples of a batch"
            )
