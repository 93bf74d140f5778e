"""All operator rules, and what capture asks them.

One :class:`OpRule` per operator kind, whose fields are all that is known of it; :func:`facts_of`
finds it. The rules themselves stand beside this file, by how they read: ``alias`` (not at all:
views), ``pointwise``, ``spatial`` (sliding), ``whole_axis``, ``rearranged`` and ``indexing``
(copies), ``recurrent`` (steps and a state); those of operators that are not torch's own come by
``custom``.
"""

from __future__ import annotations

import functools
import logging
import re

from torch_getfuse.backend.rules import (
    alias,
    indexing,
    pointwise,
    rearranged,
    recurrent,
    spatial,
    whole_axis,
)
from torch_getfuse.backend.rules.rule import (
    Alias,
    Call,
    OpRule,
    Sample,
    Spec,
    no_rule,
    whole,
)
from torch_getfuse.plugins import RULES as RULES_OF_LIBRARIES
from torch_getfuse.plugins import failed

log = logging.getLogger(__name__)

RULES: tuple[OpRule, ...] = (
    *alias.RULES,
    *pointwise.RULES,
    *spatial.RULES,
    *whole_axis.RULES,
    *rearranged.RULES,
    *indexing.RULES,
    *recurrent.RULES,
)
"""Every rule; the conformance test runs the sample of each."""

EXTRA_SAMPLES: dict[str, Sample] = {
    **alias.EXTRA_SAMPLES,
    **pointwise.EXTRA_SAMPLES,
    **spatial.EXTRA_SAMPLES,
    **whole_axis.EXTRA_SAMPLES,
    **rearranged.EXTRA_SAMPLES,
    **indexing.EXTRA_SAMPLES,
    **recurrent.EXTRA_SAMPLES,
}
"""Variants that a rule's one sample does not reach."""

BY_TARGET: dict[str, OpRule] = {target: rule for rule in RULES for target in rule.targets}
"""Rule by name of the operator. What :func:`register_rule` adds is among them."""

UNKNOWN = OpRule("", (), no_rule, None)
"""Of an operator that nobody has described: it has none of the facts."""


def find_rule(name: str) -> OpRule | None:
    """The rule of an operator; the package of a library registers its own when it is asked for.

    Raises:
        PluginError: where such a package fails to.
    """
    if name not in BY_TARGET:
        library = re.split(r"::|\.", name)[0]
        if library != name:
            _register_rules_of(library)
    return BY_TARGET.get(name)


@functools.cache
def _register_rules_of(library: str) -> None:
    entry = RULES_OF_LIBRARIES.find(library)
    if entry is not None:
        register = RULES_OF_LIBRARIES.load(library)
        try:
            register()
        except Exception as error:  # it is the package's code, which raises what it likes
            raise failed(entry, error) from error


def facts_of(name: str) -> OpRule:
    """The rule of an operator, for its facts; :data:`UNKNOWN` where it has none.

    Raises:
        PluginError: as :func:`find_rule`.
    """
    return find_rule(name) or UNKNOWN


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
    rule = find_rule(call.name)
    if rule is None:
        return no_rule(call)
    try:
        return rule.rule(call)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        log.info("the rule of %s does not know the arguments of a call: %r", call.name, error)
        reason = f"no rule for these arguments of {call.name}: it reads its whole inputs"
        return whole(call, call.name, reason, macs=None)
