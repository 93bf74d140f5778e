"""All operator rules, and what capture asks them.

One :class:`OpRule` per operator kind; the rules themselves are in ``rules_*.py`` by how they
read: ``alias`` (not at all: views), ``pointwise``, ``spatial`` (sliding), ``global`` (whole axes).
"""

from __future__ import annotations

import logging

from torch_getfuse.backend.rules import alias, pointwise, spatial, whole_axis
from torch_getfuse.backend.rules.rule import (
    Alias,
    Call,
    OpRule,
    Sample,
    Spec,
    no_rule,
    whole,
)

log = logging.getLogger(__name__)

RULES: tuple[OpRule, ...] = (
    *alias.RULES,
    *pointwise.RULES,
    *spatial.RULES,
    *whole_axis.RULES,
)
"""Every rule; the conformance test runs the sample of each."""

EXTRA_SAMPLES: dict[str, Sample] = {
    **alias.EXTRA_SAMPLES,
    **pointwise.EXTRA_SAMPLES,
    **spatial.EXTRA_SAMPLES,
    **whole_axis.EXTRA_SAMPLES,
}
"""Variants that a rule's one sample does not reach."""

BY_TARGET: dict[str, OpRule] = {target: rule for rule in RULES for target in rule.targets}

# Their values do not depend on the tensors they are given, only on shapes and dtypes.
FACTORIES = frozenset(
    f"{kind}{like}"
    for kind, like in (
        *((f"new_{what}", "") for what in ("zeros", "ones", "full", "empty", "tensor")),
        *(
            (what, "_like")
            for what in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
        ),
    )
)


def positional(name: str) -> tuple[str, ...]:
    """Names of the positional arguments of a builtin or method that goes by a plain name."""
    rule = BY_TARGET.get(name)
    return rule.params if rule is not None else ("input",)


def apply_rule(call: Call) -> Spec | Alias:
    """How a call reads its operands; :func:`no_rule`'s answer where no rule knows it.

    That also answers for arguments that a rule cannot read: a tensor where it expects a number
    (``F.pad`` by a buffer), or a form that torch allows and the rule does not foresee. The report
    counts such operators among those without a rule.
    """
    rule = BY_TARGET.get(call.name)
    if rule is None:
        return no_rule(call)
    try:
        return rule.rule(call)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        log.info("the rule of %s does not know the arguments of a call: %r", call.name, error)
        reason = f"no rule for these arguments of {call.name}: it reads its whole inputs"
        return whole(call, call.name, reason)
