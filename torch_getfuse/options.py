"""The options of every entry point: one frozen dataclass, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from torch_getfuse.accelerator import (
    Accelerator,
    checked_count,
    checked_width,
    format_size,
    parse_size,
)
from torch_getfuse.accelerator_file import find_accelerator
from torch_getfuse.errors import OptionError, nearest
from torch_getfuse.limits import MOST
from torch_getfuse.plugins import EXPLAINERS, SCHEMES, SEARCHES, fact, name_of
from torch_getfuse.widths import Width

GRANULARITIES = ("line", "pixel")
SPLIT_RULES = ("least_traffic", "most_operators")
# What modules above offer under names that only they know; tests hold both lists equal.
CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "scheme": SCHEMES.choices,
    "granularity": GRANULARITIES,
    "method": SEARCHES.choices,
    "explainer": EXPLAINERS.choices,
    "split_rule": SPLIT_RULES,
}
"""What options take without any other package installed, by option."""

_NAMED = (SCHEMES, SEARCHES, EXPLAINERS)
"""Options that take names of installed packages, and objects."""

SWEPT = {
    "buffer": "buffers",
    "scheme": "schemes",
    "granularity": "granularities",
    "method": "methods",
}
"""Options of which a sweep takes several values -> its arguments for them."""
REFUSED_BY_SWEEP = {
    "plan": "a sweep makes its plans",
    "inner": "a sweep runs no model",
    "strict": "a sweep runs no model",
}
"""Options that do not apply to a sweep, each with the reason."""


class SweptKwargs(TypedDict, total=False):
    """Options that are the same for all points of a sweep: what an editor completes."""

    residency: bool
    slice_channels: int
    activation_bytes: Width | None
    weight_bytes: Width | None
    align_channels: int | None
    accelerator: str | Accelerator | None
    keep: Sequence[str]
    split_before: Sequence[str]
    together: Sequence[Sequence[str]]
    explainer: str | Callable[..., Any] | None
    split_rule: str
    budget: int
    seed: int
    time_limit: float
    backward: bool | str
    cache: bool | str | Path


class OptionKwargs(SweptKwargs, total=False):
    """All options as keyword arguments, with the types of :class:`Options`."""

    buffer: int | str | None
    scheme: str | Callable[..., Any]
    granularity: str
    method: str | Callable[..., Any]
    inner: str | Callable[..., Any]
    plan: Any
    strict: bool
    progress: bool | str


@dataclass(frozen=True)
class Options:
    """What to plan for, how to search, and how to run the groups.

    Attributes:
        buffer: on-chip buffer, bytes or text like ``"256KB"`` (1024-based).
        scheme: the cost model, by name or as what makes one of a graph: a ``FusionScheme`` class.
        granularity: unit of LBDF's streams; the others have none and ignore it.
        residency: whether tensors may stay on chip between steps (cascade; others ignore it).
        slice_channels: output channels of which streamed weights are staged at a time (cascade).
        activation_bytes, weight_bytes: bytes of an element, in steps of 1/8 (0.5 for 4 bits);
            ``None``: each tensor as it is stored. ``weight_bytes=0``: weights are read where they
            are stored (flash), and cost neither DRAM access nor buffer.
        align_channels: channels of stored feature maps are padded to a multiple of this, as on
            Ethos-U to 16; ``None`` for the accelerator's, or 1.
        accelerator: a preset of buffer, element widths and alignment, where these are not given:
            its name (``torch-getfuse accelerators`` lists them), ``"chips.toml:name"`` for one of a
            TOML file (``"chips.toml"`` for its only one), or an ``Accelerator``; an
            ``Accelerator`` on the finished object.
        keep: tensors that must stay on chip from their producer to their last reader, by name or by
            the operator or module that makes them: under cascade resident, else in one group.
        split_before: operators, or modules, before which a group must end: every edge into them
            from outside is a border.
        together: sets of operators, or modules, each of which must share one group.
        method: the search, by name or as a function.
        explainer: says which edges make a group too big, by name or as what makes an
            ``EdgeRanker`` of a problem and a seed; ``None``: split at random.
        split_rule: which cut is taken where only one side fits.
        budget: plans that random, local and NSGA-II search evaluate.
        seed: of everything that is drawn; same seed, same plan.
        time_limit: seconds of search, in counted steps; CPU time ends it at twice that. The best
            plan so far is kept.
        inner: how the fusion groups run: ``"eager"``; ``"auto"``: inference on a CPU by packed
            convolutions where these are timed faster, else eager; the name of a torch.compile
            backend such as ``"inductor"``; or a backend callable. Each group is compiled on its
            own. ``"depth_first"`` runs each group row by row in the schedule of the cost model
            (inference, static shapes, LBDF at ``line`` granularity).
        backward: plan and split the backward graph as well: ``True``, ``False``, or ``"auto"``:
            where ``inner`` is not eager.
        cache: keep plans in memory and in the user's cache folder: ``True``, ``False``, or the
            path of a folder. Plans by an object (of scheme, method or explainer) are not kept, for
            nobody can tell when it has changed.
        plan: a saved plan (path) or a ``PartitionPlan`` to use instead of searching.
        progress: show a bar: ``True``, ``False``, or ``"auto"``: on a terminal, after 2 s.
        strict: raise where planning fails, instead of a warning and the unplanned graph.

    Raises:
        OptionError: on construction, for a value that an option does not take.
    """

    buffer: int | str | None = None
    scheme: str | Callable[..., Any] = "lbdf"
    granularity: str = "line"
    residency: bool = True
    slice_channels: int = 16
    activation_bytes: Width | None = None
    weight_bytes: Width | None = None
    align_channels: int | None = None
    accelerator: str | Accelerator | None = None
    keep: Sequence[str] = ()
    split_before: Sequence[str] = ()
    together: Sequence[Sequence[str]] = ()
    method: str | Callable[..., Any] = "auto"
    explainer: str | Callable[..., Any] | None = "all"
    split_rule: str = "least_traffic"
    budget: int = 2000
    seed: int = 0
    time_limit: float = 10.0
    inner: str | Callable[..., Any] = "auto"
    backward: bool | str = "auto"
    cache: bool | str | Path = True
    plan: Any = None
    strict: bool = False
    progress: bool | str = "auto"

    def __post_init__(self) -> None:
        for registry in _NAMED:
            value = getattr(self, registry.option)
            registry.check(value)
            if not isinstance(value, str) and name_of(value) in registry.choices:
                raise OptionError(
                    f"{registry.option}= is an object called {name_of(value)!r}, as one that comes "
                    "with this package; give it another name"
                )
        for name, choices in (("granularity", GRANULARITIES), ("split_rule", SPLIT_RULES)):
            if getattr(self, name) not in choices and not self._has_own(name):
                raise OptionError(
                    f"{name}={getattr(self, name)!r} is not one of "
                    f"{', '.join(map(repr, choices))}{nearest(str(getattr(self, name)), choices)}"
                )
        preset = self.accelerator
        if preset is not None and not isinstance(preset, Accelerator):
            preset = find_accelerator(preset)
            # A file is read once: whoever asks this object later is told what was planned for.
            object.__setattr__(self, "accelerator", preset)
        buffer = self.buffer
        if buffer is None:
            buffer = preset.buffer_bytes if preset else "256KB"
        try:
            object.__setattr__(self, "buffer", parse_size(buffer))
        except OptionError as error:
            raise OptionError(f"buffer={error}") from None
        for name in ("activation_bytes", "weight_bytes", "align_channels"):
            if getattr(self, name) is None and preset:
                object.__setattr__(self, name, getattr(preset, name))
        for name, zero in (("activation_bytes", False), ("weight_bytes", True)):
            width = getattr(self, name)
            if width is not None:
                object.__setattr__(self, name, checked_width(width, name, zero))
        if self.align_channels is None:
            object.__setattr__(self, "align_channels", 1)
        for name in ("align_channels", "slice_channels"):
            checked_count(getattr(self, name), name, "channels")
        if not isinstance(self.time_limit, (int, float)) or not self.time_limit > 0:
            raise OptionError(f"time_limit={self.time_limit!r} is not a number of seconds above 0")
        checked_count(self.budget, "budget", "plans", MOST)
        if not _is_int(self.seed):
            raise OptionError(f"seed={self.seed!r} is not a whole number")
        if not isinstance(self.progress, bool) and self.progress != "auto":
            raise OptionError(f"progress={self.progress!r} is not True, False or 'auto'")
        if not callable(self.inner) and (not isinstance(self.inner, str) or not self.inner):
            raise OptionError(
                f"inner={self.inner!r} is not 'auto', 'eager', 'depth_first', the name of a "
                "torch.compile backend or a callable"
            )
        if not isinstance(self.backward, bool) and self.backward != "auto":
            raise OptionError(f"backward={self.backward!r} is not True, False or 'auto'")
        if not isinstance(self.cache, (bool, str, Path)) or self.cache == "":
            raise OptionError(f"cache={self.cache!r} is not True, False or the path of a folder")
        for name in ("keep", "split_before"):
            object.__setattr__(self, name, _names(getattr(self, name), f"{name}="))
        sets = self.together
        if isinstance(sets, str) or not isinstance(sets, Sequence):
            raise OptionError(f"together={sets!r} is not a list of lists of operator names")
        for k, names in enumerate(sets):
            if isinstance(names, str):
                raise OptionError(
                    f"together[{k}]={names!r} is a name, not a list of names; give "
                    f"together=[[{names!r}, ...]]"
                )
        object.__setattr__(
            self, "together", tuple(_names(s, f"together[{k}]=") for k, s in enumerate(sets))
        )
        if not isinstance(self.residency, bool):
            raise OptionError(f"residency={self.residency!r} is not True or False")
        if not isinstance(self.strict, bool):
            raise OptionError(f"strict={self.strict!r} is not True or False")

    def _has_own(self, name: str) -> bool:
        """Whether the scheme has granularities of its own, which it judges when it is made."""
        own = self.scheme not in SCHEMES.choices and name == "granularity"
        return own and bool(fact(SCHEMES.load(self.scheme), "granularities", ()))

    @property
    def preset(self) -> Accelerator | None:
        """The accelerator, which was looked up by its name."""
        assert not isinstance(self.accelerator, str)
        return self.accelerator

    @property
    def pinned(self) -> bool:
        """Whether anything is pinned."""
        return bool(self.keep or self.split_before or self.together)

    @property
    def objects(self) -> tuple[str, ...]:
        """Options of the search that were given as objects, not by name."""
        return tuple(r.option for r in _NAMED if callable(getattr(self, r.option)))

    @property
    def named(self) -> frozenset[str]:
        """The options that :meth:`of` was given; others have their defaults."""
        named: frozenset[str] = self.__dict__.get("_named", frozenset())
        return named

    @property
    def buffer_bytes(self) -> int:
        """The buffer in bytes."""
        assert isinstance(self.buffer, int)
        return self.buffer

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Options:
        """Options from a mapping; an unknown name raises with the nearest right one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                hint = nearest(str(name), known) or f"; known: {', '.join(known)}"
                raise OptionError(f"unknown option {name!r}{hint}")
        plan = options.get("plan")
        if plan is not None and isinstance(plan, (str, Path)) and not str(plan):
            raise OptionError("plan='' is an empty path; give a plan file or leave the option out")
        made = cls(**cast("dict[str, Any]", options))
        object.__setattr__(made, "_named", frozenset(options))
        return made


def format_option(name: str, value: Any) -> str:
    """The value of an option of planning, as tables and messages show it."""
    if value is None:
        return "as stored"
    if name == "buffer":
        return format_size(value)
    if name == "together":
        return str([list(names) for names in value])
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _names(given: object, where: str) -> tuple[str, ...]:
    """Names as a tuple; raises :class:`OptionError` for what is no list of them."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        hint = f"; give [{given!r}]" if isinstance(given, str) else ""
        raise OptionError(f"{where}{given!r} is not a list of names{hint}")
    for name in given:
        if not isinstance(name, str) or not name:
            raise OptionError(f"{where}{given!r} holds {name!r}, which is no name")
    return tuple(given)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
