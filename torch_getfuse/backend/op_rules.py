"""All operator rules, and what capture asks them.

One :class:`OpRule` per operator kind; the rules themselves are in ``rules_*.py`` by how they
read: ``alias`` (not at all: views), ``pointwise``, ``spatial`` (sliding), ``global`` (whole axes).
"""

from __future__ import annotations

from torch_getfuse.backend import rules_alias, rules_global, rules_pointwise, rules_spatial
from torch_getfuse.backend.rule_types import Alias, Call, OpRule, Sample, Spec, no_rule

RULES: tuple[OpRule, ...] = (
    *rules_alias.RULES,
    *rules_pointwise.RULES,
    *rules_spatial.RULES,
    *rules_global.RULES,
)
"""Every rule; the conformance test runs the sample of each."""

EXTRA_SAMPLES: dict[str, Sample] = {
    **rules_alias.EXTRA_SAMPLES,
    **rules_pointwise.EXTRA_SAMPLES,
    **rules_spatial.EXTRA_SAMPLES,
    **rules_global.EXTRA_SAMPLES,
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
    """How a call reads its operands; :func:`no_rule`'s answer where no rule knows it."""
    rule = BY_TARGET.get(call.name)
    return rule.rule(call) if rule is not None else no_rule(call)
