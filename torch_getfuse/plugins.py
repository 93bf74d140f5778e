"""What people name or give as objects: cost models, searches, explainers, operator rules.

Each kind has a :class:`Registry`. The built-in names and those of installed packages are the same
kind of thing in it, an :class:`importlib.metadata.EntryPoint`, and are loaded by the same line.
The built-in ones are written down here rather than in ``pyproject.toml``: so they are there in a
checkout that was never installed, and cost no search of the installed packages.

Nothing is imported before it is asked for (``importlib.metadata`` itself included, for the command
line's ``--help`` has the names too), and installed packages are looked through only for a name that
is not built in. A built-in name cannot be taken by a package.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_getfuse.errors import OptionError, PluginError, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


class Registry:
    """The names of one kind, and what they stand for.

    Args:
        option: which option takes them.
        group: of the entry points in which other packages name theirs.
        built_in: name -> ``"module:attribute"``.
        before: names that the option takes besides, which stand for no object.
        after: the same, told after the others.
    """

    def __init__(
        self,
        option: str,
        group: str,
        built_in: Mapping[str, str],
        before: tuple[str, ...] = (),
        after: tuple[None, ...] = (),
    ) -> None:
        self.option = option
        self.group = group
        self._built_in = dict(built_in)
        self._before, self._after = before, after

    @property
    def built_in(self) -> tuple[str, ...]:
        """Names of what comes with this package and can be loaded."""
        return tuple(self._built_in)

    @property
    def choices(self) -> tuple[str | None, ...]:
        """All that the option takes without any other package."""
        return (*self._before, *self._built_in, *self._after)

    def check(self, value: object) -> None:
        """Refuse what is neither a known name nor an object to call; nothing is loaded.

        Raises:
            OptionError: lists the names, those of installed packages included.
        """
        if value in self.choices if value is None or isinstance(value, str) else callable(value):
            return
        others = _installed(self.group, tuple(sys.path))
        if isinstance(value, str) and value in others:
            return
        known = [*self._before, *self._built_in, *others]
        hint = nearest(value, known) if isinstance(value, str) else "; or give what makes one"
        raise OptionError(
            f"{self.option}={value!r} is not one of "
            f"{', '.join(map(repr, (*known, *self._after)))}{hint}"
        )

    def find(self, name: str) -> EntryPoint | None:
        """What a name stands for, not loaded; ``None`` for an unknown name.

        Raises:
            PluginError: where several packages offer it.
        """
        if name in self._built_in:
            from importlib.metadata import EntryPoint

            return EntryPoint(name, self._built_in[name], self.group)
        found = _installed(self.group, tuple(sys.path)).get(name, ())
        if len(found) > 1:
            packages = " and ".join(sorted(map(_package, found)))
            raise PluginError(
                f"{self.option}={name!r} is offered by {packages} (entry points of "
                f"{self.group}); uninstall all but one"
            )
        return found[0] if found else None

    def load(self, value: Any) -> Any:
        """The object that a name stands for; an object stands for itself.

        Raises:
            OptionError: for an unknown name.
            PluginError: where a package's object cannot be loaded; names package and entry point.
        """
        self.check(value)
        if not isinstance(value, str):
            return value
        found = self.find(value)
        assert found is not None, f"{value!r} has a meaning of its own, and no object"
        return _load(found)

    def identity(self, value: Any) -> str | None:
        """Text that is another one wherever ``value`` may stand for something else.

        ``None`` for an object, of which nobody can tell when it has changed. What is built in has
        its name, for this package's code has a digest of its own (``backend/plan_cache.py``); what
        another package offers adds that package's version and a digest of its sources.
        """
        if value is None:
            return ""
        if not isinstance(value, str):
            return None
        if value in self.choices:
            return value
        found = self.find(value)
        if found is None:
            return None
        _load(found)
        top = sys.modules[found.module.partition(".")[0]]
        module = top if top.__file__ else sys.modules[found.module]
        path = Path(str(module.__file__))
        sources = source_digest(path.parent if path.name == "__init__.py" else path)
        return f"{value} = {found.value} of {_package(found)}, {sources}"


@functools.lru_cache(maxsize=16)
def _installed(group: str, path: tuple[str, ...]) -> Mapping[str, tuple[EntryPoint, ...]]:
    """Name -> entry points of installed packages on a search path."""
    from importlib.metadata import entry_points

    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=group):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # importing a package runs its code, which raises what it likes
        if entry.dist is None:
            raise  # built in: not a plug-in's fault
        raise failed(entry, error) from error


def failed(entry: EntryPoint, error: Exception) -> PluginError:
    """The error for what a package offers and cannot be used."""
    return PluginError(
        f"{entry.name!r} of the package {_package(entry)} cannot be loaded (entry point "
        f"{entry.name} = {entry.value} of {entry.group}): {type(error).__name__}: {error}; "
        "repair or uninstall that package"
    )


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "torch_getfuse"


def source_digest(root: Path) -> str:
    """A digest of a file, or of the Python sources and weights below a folder.

    Raises:
        OSError: where one cannot be read.
    """
    import hashlib

    digest = hashlib.sha256()
    files = [root] if root.is_file() else [*root.rglob("*.py"), *root.rglob("*.safetensors")]
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def name_of(value: object) -> str:
    """How an option's value is called in plans and reports: its name, that of a class or function.

    An object may have a ``name`` of its own.
    """
    if isinstance(value, str):
        return value
    own = fact(value, "name", None)
    if isinstance(own, str) and own:
        return own
    value = _inner(value)
    return str(getattr(value, "__name__", type(value).__name__))


def fact(value: object, name: str, default: Any) -> Any:
    """An attribute of an object, which a :class:`functools.partial` takes from what it calls."""
    return getattr(_inner(value), name, default)


def _inner(value: object) -> object:
    while isinstance(value, functools.partial):
        value = value.func
    return value


SCHEMES = Registry(
    "scheme",
    "torch_getfuse.schemes",
    {
        "lbdf": "torch_getfuse.partition.cost.lbdf.model:Lbdf",
        "brr": "torch_getfuse.partition.cost.brr.model:Brr",
        "cascade": "torch_getfuse.partition.cost.cascade.model:Cascade",
    },
)
"""Each makes a :class:`~torch_getfuse.partition.cost.scheme.FusionScheme` of a graph."""

SEARCHES = Registry(
    "method",
    "torch_getfuse.searches",
    {
        "random": "torch_getfuse.partition.search.random:random_search",
        "local": "torch_getfuse.partition.search.local:local_search",
        "nsga2": "torch_getfuse.partition.search.nsga2:nsga2_search",
    },
    before=("auto", "direct", "exact"),
)
"""Each is a :class:`~torch_getfuse.partition.problem.Search`. The names before are no searches of
their own but how the planner puts several together."""

EXPLAINERS = Registry(
    "explainer",
    "torch_getfuse.explainers",
    {
        "rgexplainer": "torch_getfuse.explain.explainers:RG",
        "gnnexplainer": "torch_getfuse.explain.explainers:GNN",
        "pgexplainer": "torch_getfuse.explain.explainers:PG",
        "saliency": "torch_getfuse.explain.explainers:SALIENCY",
        "random": "torch_getfuse.partition.search.recursive_split:random_ranker",
        "all": "torch_getfuse.partition.search.recursive_split:all_ranker",
    },
    after=(None,),
)
"""Each makes an :class:`~torch_getfuse.partition.search.recursive_split.EdgeRanker` of a problem
and a seed."""

ASKED_EXPLAINERS = ("saliency", "rgexplainer", "pgexplainer", "gnnexplainer")
"""Whom an explanation asks by default: all that explain the GNN. On the whole MobileNetV2 the last
takes 0.2 s, the others 10 ms."""


def check_explainers(explainers: Sequence[object]) -> None:
    """Raises :class:`OptionError` for a name that is no explainer's."""
    for explainer in explainers:
        if explainer is None:
            raise OptionError("explainers: None explains nothing; leave it out")
        EXPLAINERS.check(explainer)


RULES = Registry("rules", "torch_getfuse.rules", {})
"""Each is a function without arguments that registers the rules of a library's operators; its name
is that library's namespace (``"mylib"`` of ``mylib::relu``)."""
