"""What a plan from outside is worth, as an object that prints and exports.

Text formats use human-readable sizes (1024-based), data formats integer bytes.
:mod:`torch_getfuse.price_graph` computes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch_getfuse.accelerator import format_activations, format_size, format_width
from torch_getfuse.atomic_files import replace_text
from torch_getfuse.options import format_option
from torch_getfuse.partition.cost.scheme import CostTerm, Dram
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.reporting.blame import dram_dict
from torch_getfuse.reporting.export import (
    MARKDOWN,
    Style,
    compact,
    counted,
    features,
    plain,
)
from torch_getfuse.reporting.printed import Printed
from torch_getfuse.reporting.section import Section
from torch_getfuse.reporting.suffixes import APPRAISAL, known_suffix
from torch_getfuse.terminal import Mark, Marked, share

SCHEMA_VERSION = 1
_TERMS = 8  # of each group, in the data formats


@dataclass(frozen=True)
class PricedGroup:
    """One group of a plan from outside.

    Attributes:
        ops: its operators in topological order, those that the names select.
        problems: why it is no legal group, one sentence each; empty for a legal one.
        buffer_bytes: ``F_b``; ``None`` where the cost model has no schedule for it.
        dram: of a legal group what it moves; else what crosses its border and its weights, once.
        terms: what fills the buffer, largest first.
        way: how it runs, as a step of a cascade plan; empty under other schemes.
    """

    ops: tuple[str, ...]
    problems: tuple[str, ...]
    buffer_bytes: int | None
    dram: Dram
    terms: tuple[CostTerm, ...]
    way: str = ""

    @property
    def legal(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values; sizes in bytes."""
        return {
            "ops": list(self.ops),
            "legal": self.legal,
            "problems": list(self.problems),
            "buffer_bytes": self.buffer_bytes,
            **dram_dict(self.dram),
            "terms": [
                {"kind": term.kind, "name": term.name, "bytes": term.bytes}
                for term in self.terms[:_TERMS]
            ],
            **({"way": self.way} if self.way else {}),
        }


@dataclass(frozen=True)
class Appraisal(Printed):
    """A plan from outside under a cost model of this package.

    Attributes:
        groups: in the order in which they were given.
        problems: what is wrong with the plan as a whole, one sentence each.
        plan: the priced plan, where it is legal: it can be reported, split and run like any other.
            Its bound is that of :attr:`best`.
        best: our plan for the same graph, options and pins.
        residents_exact: whether ways and resident tensors of the given steps are proved to be the
            best (cascade); ``None`` under other schemes and for a plan that is not legal.
        accelerator: name of the preset that it was judged for; empty without one.
        model: what people call the model; empty for an operator graph alone.
        options_of: where options came from that were not given: ``"the priced plan"``,
            ``"plan="``, or ``""``: the defaults.
        changed: options in which the figures differ from that plan's own -> its value, and the
            one that was given instead.
    """

    groups: tuple[PricedGroup, ...]
    problems: tuple[str, ...]
    plan: PartitionPlan | None
    best: PartitionPlan
    residents_exact: bool | None = None
    accelerator: str = ""
    model: str = ""
    options_of: str = ""
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def legal(self) -> bool:
        """Whether it is a legal plan (docs/method.md, section 1)."""
        return self.plan is not None

    @cached_property
    def _ours(self) -> Section:
        return Section(self.best)

    @cached_property
    def network(self) -> Dram | None:
        """DRAM access of the whole network under the plan, per sample; ``None`` if not legal."""
        return None if self.plan is None else Section(self.plan).network_planned

    @property
    def unfused(self) -> Dram:
        """DRAM access of the whole network with every operator alone, per sample."""
        return self._ours.network_unfused

    @property
    def ours(self) -> Dram:
        """DRAM access of the whole network under :attr:`best`, per sample."""
        return self._ours.network_planned

    @property
    def above_best(self) -> float | None:
        """How far the plan is above :attr:`best`, as a fraction of it; negative if below."""
        total = None if self.network is None else self.network.total
        return None if total is None or not self.ours.total else total / self.ours.total - 1

    @property
    def above_optimum(self) -> float | None:
        """How far it can be above the optimum of the whole network at most; ``None`` if unknown."""
        bound = self._ours.lower_bound
        return None if self.network is None or not bound else self.network.total / bound - 1

    @property
    def distance(self) -> str:
        """How far it is from the optimum, in words."""
        if self.network is None or self.above_best is None:
            return "none: what is not legal has no distance"
        standing = self.best.standing
        if self.best.proof == "optimal":
            if self.network.total == self.ours.total:
                return f"optimal ({standing})"
            return f"{self.above_best:.1%} above the optimum ({standing})"
        side = "above" if self.above_best >= 0 else "below"
        text = f"{abs(self.above_best):.1%} {side} our plan, which is not proved to be the best"
        if self.above_optimum is not None:
            text += f"; at most {self.above_optimum:.1%} above the optimum ({standing})"
        return text

    # -- forms ----------------------------------------------------------------------------

    def parts(self, style: Style) -> list[str]:
        """Headings, tables and paragraphs in a text format."""
        return _parts(self, style)

    def __repr__(self) -> str:
        groups = counted(len(self.groups), _noun(self))
        if self.network is None:
            return f"Appraisal({groups}, not legal, {format_size(self.best.buffer_bytes)})"
        return (
            f"Appraisal({groups}, {format_size(self.network.total)}, {self.distance}, "
            f"{format_size(self.best.buffer_bytes)})"
        )

    def to_markdown(self) -> str:
        """Headings and pipe tables."""
        return "\n\n".join(_parts(self, MARKDOWN)) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values; sizes are integer bytes per sample, totals of the whole network."""
        best = self.best
        return {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": best.graph.fingerprint,
            "model": self.model or None,
            "scheme": best.scheme,
            "buffer_bytes": best.buffer_bytes,
            "activation_bytes": best.activation_bytes,
            "align_channels": best.align_channels,
            "weight_bytes": best.weight_bytes,
            "pins": best.pins,
            "accelerator": self.accelerator or None,
            "options_of": self.options_of,
            "changed": {
                name: {"plan": value, "used": used} for name, (value, used) in self.changed.items()
            },
            "legal": self.legal,
            "problems": list(self.problems),
            "groups": [group.to_dict() for group in self.groups],
            "totals": {
                "plan": None if self.network is None else dram_dict(self.network),
                "unfused": dram_dict(self.unfused),
                "best": dram_dict(self.ours),
                "lower_bound_bytes": self._ours.lower_bound,
            },
            "proof": best.proof,
            "claimed_by": best.claimed_by,
            "above_best": self.above_best,
            "above_optimum": self.above_optimum,
            "residents_exact": self.residents_exact,
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def save(self, path: str | Path) -> None:
        """Write it by suffix: ``.txt``, ``.md``, ``.json``.

        Raises:
            OptionError: for another suffix.
            FileError: if the file cannot be written.
        """
        forms = {
            ".txt": lambda: self.render(plain()) + "\n",
            ".md": self.to_markdown,
            ".json": self.to_json,
        }
        replace_text(path, forms[known_suffix(path, "an appraisal", APPRAISAL)]())


def _parts(made: Appraisal, style: Style) -> list[str]:
    wrong = sum(not group.legal for group in made.groups)
    noun = _noun(made)
    verdict = "a legal plan"
    if not made.legal:
        verdict = f"not a legal plan: {counted(wrong, noun)} of {len(made.groups)} wrong" + (
            f", and {counted(len(made.problems), 'problem')} of the whole" if made.problems else ""
        )
    parts = [style.heading(f"The plan from outside: {verdict}"), _totals(made, style)]
    parts.append(style.table(_facts(made), (), "ll", (1,)))
    parts.append(style.heading(f"Its {noun}s"))
    parts.append(_group_table(made, style, noun))
    told = [f"{noun} {k}: {text}" for k, group in enumerate(made.groups) for text in group.problems]
    if told := [*made.problems, *told]:
        parts.append(style.heading("What is wrong"))
        parts += [style.paragraph(Marked(text, Mark.OVER)) for text in told]
    return parts


def _totals(made: Appraisal, style: Style) -> str:
    columns = (made.unfused, made.network, made.ours)

    def row(name: str, size: Any) -> list[str]:
        return [name, *("-" if dram is None else format_size(size(dram)) for dram in columns)]

    rows = [
        row("features", features),
        row("weights", lambda dram: dram.weight),
        row("whole network", lambda dram: dram.total),
    ]
    return style.table(
        rows, ("DRAM access per sample", "unfused", "this plan", "our plan"), "lrrr", (0,)
    )


def _facts(made: Appraisal) -> list[list[str]]:
    best = made.best
    proof = {
        "optimal": f"optimal ({best.standing})",
        "bound": f"at most {best.gap:.1%} above the optimum ({best.standing})",
    }.get(best.proof or "", "nothing proved")
    apart = f" and {counted(len(best.apart), 'unfusable operator')}" if best.apart else ""
    ours = f"{counted(len(best.groups), _noun(made))}{apart}; {proof}"
    rows = [["network", made.model]] if made.model else []
    rows += [["distance", made.distance], ["our plan", ours]]
    if made.residents_exact is not None:
        rows.append(
            [
                "steps",
                "ways and resident tensors are the best for this sequence of steps"
                if made.residents_exact
                else "ways and resident tensors are good ones, not proved to be the best",
            ]
        )
    if best.pins:
        rows.append(["pinned", "; ".join(f"{name}={what}" for name, what in best.pins.items())])
    if made.options_of:
        rows.append(["options", _told_options(made)])
    rows.append(
        [
            "assumptions",
            f"{f'accelerator {made.accelerator}, ' if made.accelerator else ''}"
            f"scheme {best.scheme}, buffer {format_size(best.buffer_bytes)}, "
            f"{format_activations(best.activation_bytes, best.align_channels)}, "
            f"{format_width(best.weight_bytes)}, "
            "one sample at a time",
        ]
    )
    return rows


def _noun(made: Appraisal) -> str:
    """What the groups are: under cascade the steps of a sequence."""
    return "step" if made.best.scheme == "cascade" else "group"


def _told_options(made: Appraisal) -> str:
    """Which plan's options these are, and where they were given otherwise."""
    told = f"those of {made.options_of}"
    if not made.changed:
        return told
    instead = (
        f"{name} {format_option(name, used)} (there {format_option(name, value)})"
        for name, (value, used) in made.changed.items()
    )
    return f"{told}, but for {', '.join(instead)}"


def _standing(made: Appraisal, group: PricedGroup) -> str:
    if not group.legal:
        return Marked("no", Mark.OVER)
    return "unfusable" if set(group.ops) <= set(made.best.unfusable) else "yes"


def _group_table(made: Appraisal, style: Style, noun: str) -> str:
    buffer = made.best.buffer_bytes
    rows = [
        [
            str(k),
            compact(group.ops) if group.ops else "",
            *([group.way] if noun == "step" else []),
            "none" if group.buffer_bytes is None else format_size(group.buffer_bytes),
            "" if group.buffer_bytes is None else share(group.buffer_bytes, buffer),
            *map(format_size, group.dram),
            _standing(made, group),
        ]
        for k, group in enumerate(made.groups)
    ]
    way = ("way",) if noun == "step" else ()
    headers = (noun, "operators", *way, "buffer", "share", "read", "write", "weights", "legal")
    return style.table(rows, headers, "ll" + "l" * len(way) + "rrrrrl", below=(1,))
