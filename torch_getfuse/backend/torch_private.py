"""Every private name of torch that this package uses, and where older versions have it.

torch promises nothing about names that start with an underscore: ``torch._dynamo``, ``_schema``,
``_orig_mod``. No other file uses one (``tests/backend/test_torch_private.py`` reads them all), so
a new version of torch is tried by running that test and editing this file.

There are three kinds. A *name* of the table ``NAMES`` is torch's own object and is imported from
here; it is looked up when it is first imported. A function marked with :func:`reads` hides a
private attribute. ``ON_TRIAL`` lists what torch marks its own objects with, which is absent from
other objects: a model that is not compiled has no ``_orig_mod``.

Where a version of torch lacks a name, whatever needs it raises one
:class:`~torch_getfuse.errors.UnsupportedTorchError` that says which, and what to do. On a version
that was not tried (``torch_versions.py``), a name is used as long as it is there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from torch_getfuse.backend.torch_versions import TRIED
from torch_getfuse.errors import UnsupportedTorchError

if TYPE_CHECKING:
    from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
    from torch._dynamo.backends.common import aot_autograd as aot_autograd
    from torch._dynamo.exc import BackendCompilerFailed as BackendCompilerFailed
    from torch._dynamo.exc import RestartAnalysis as RestartAnalysis
    from torch._dynamo.exc import TorchDynamoException as TorchDynamoException
    from torch._dynamo.exc import TorchRuntimeError as TorchRuntimeError
    from torch._dynamo.exc import Unsupported as Unsupported
    from torch._dynamo.source import ConstantSource as ConstantSource
    from torch._dynamo.symbolic_convert import TensorifyState as TensorifyState
    from torch._dynamo.utils import is_parameter_freezing as is_parameter_freezing
    from torch._dynamo.utils import preserve_rng_state as preserve_rng_state
    from torch._guards import tracing as tracing
    from torch._higher_order_ops.wrap import tag_activation_checkpoint as tag_activation_checkpoint
    from torch._library.fake_class_registry import FakeScriptObject as FakeScriptObject
    from torch._ops import HigherOrderOperator as HigherOrderOperator
    from torch._ops import OperatorBase as OperatorBase
    from torch._ops import OpOverload as OpOverload
    from torch._ops import OpOverloadPacket as OpOverloadPacket
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch._subclasses.fake_tensor import unset_fake_temporarily as unset_fake_temporarily
    from torch.amp import autocast_mode
    from torch.fx.experimental.symbolic_shapes import optimization_hint as optimization_hint
    from torch.nn.modules import batchnorm, dropout
    from torch.utils._python_dispatch import (
        is_traceable_wrapper_subclass as is_traceable_wrapper_subclass,
    )
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map as tree_map
    from torch.utils._pytree import tree_map_only as tree_map_only
    from torch.utils._sympy.functions import FloorDiv as FloorDiv
    from torch.utils._sympy.functions import Max as Max
    from torch.utils._sympy.functions import Mod as Mod
    from torch.utils._sympy.printers import PythonPrinter as PythonPrinter
    from torch.utils._sympy.symbol import SymT as SymT
    from torch.utils._sympy.symbol import symbol_is_type as symbol_is_type

    enter_autocast = autocast_mode._enter_autocast
    exit_autocast = autocast_mode._exit_autocast
    BatchNormBase = batchnorm._BatchNorm
    DropoutBase = dropout._DropoutNd
    set_grad_enabled: Callable[[bool], None]
    unsafe_index_put: OpOverload

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class PrivateName:
    """A private name of torch.

    Attributes:
        path: ``module:attribute``, where it is.
        feature: what cannot work without it, as the subject of a sentence.
        older: where older versions of torch have it, the newest first.
    """

    path: str
    feature: str
    older: tuple[str, ...] = ()

    def find(self) -> Any:
        """What torch has under this name.

        Raises:
            UnsupportedTorchError: where it has nothing.
        """
        try:
            return _at(self.path)
        except (ImportError, AttributeError) as error:
            for path in self.older:
                with contextlib.suppress(ImportError, AttributeError):
                    return _at(path)
            raise self.missing() from error

    def missing(self) -> UnsupportedTorchError:
        """The error of whoever needs a name that torch does not have."""
        return UnsupportedTorchError(
            f"torch {torch.__version__} has no {self.path.replace(':', '.')}, so {self.feature} "
            f"cannot work; it was tried on torch {', '.join(TRIED)}: "
            f"pip install 'torch=={TRIED[-1]}.*'"
        )


def _at(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))


_CAPTURE = "the capture of a model"
_BACKEND = "the torch.compile backend"
_SHAPES = "compiling groups at dynamic shapes"

NAMES: Mapping[str, PrivateName] = {
    # Tensors without data, which traces are made of.
    "FakeTensor": PrivateName("torch._subclasses.fake_tensor:FakeTensor", _CAPTURE),
    "FakeTensorMode": PrivateName("torch._subclasses.fake_tensor:FakeTensorMode", _CAPTURE),
    "FakeScriptObject": PrivateName(
        "torch._library.fake_class_registry:FakeScriptObject", _CAPTURE
    ),
    "is_traceable_wrapper_subclass": PrivateName(
        "torch.utils._python_dispatch:is_traceable_wrapper_subclass", _CAPTURE
    ),
    # Leaves the fake mode of AOTAutograd for a while.
    "unset_fake_temporarily": PrivateName(
        "torch._subclasses.fake_tensor:unset_fake_temporarily", _BACKEND
    ),
    # ``tracing(None)`` hides the context of the graph that is being compiled.
    "tracing": PrivateName("torch._guards:tracing", _CAPTURE),
    # Nested lists, tuples and dicts of tensors.
    "tree_leaves": PrivateName("torch.utils._pytree:tree_leaves", _CAPTURE),
    "tree_map": PrivateName("torch.utils._pytree:tree_map", _CAPTURE),
    "tree_map_only": PrivateName("torch.utils._pytree:tree_map_only", _BACKEND),
    # The classes of ``torch.ops.aten.add.Tensor``, ``torch.ops.aten.add`` and the like.
    "OpOverload": PrivateName("torch._ops:OpOverload", _CAPTURE),
    "OpOverloadPacket": PrivateName("torch._ops:OpOverloadPacket", _CAPTURE),
    "OperatorBase": PrivateName("torch._ops:OperatorBase", _CAPTURE),
    "HigherOrderOperator": PrivateName("torch._ops:HigherOrderOperator", _CAPTURE),
    # What Dynamo writes into a graph for ``with torch.autocast(...)`` and ``torch.no_grad()``.
    "enter_autocast": PrivateName("torch.amp.autocast_mode:_enter_autocast", _CAPTURE),
    "exit_autocast": PrivateName("torch.amp.autocast_mode:_exit_autocast", _CAPTURE),
    "set_grad_enabled": PrivateName("torch._C:_set_grad_enabled", _CAPTURE),
    # The base classes of all batch norms and all dropouts.
    "BatchNormBase": PrivateName("torch.nn.modules.batchnorm:_BatchNorm", "building models"),
    "DropoutBase": PrivateName("torch.nn.modules.dropout:_DropoutNd", _CAPTURE),
    # What Dynamo raises.
    "Unsupported": PrivateName("torch._dynamo.exc:Unsupported", _CAPTURE),
    "TorchDynamoException": PrivateName("torch._dynamo.exc:TorchDynamoException", _CAPTURE),
    "TorchRuntimeError": PrivateName("torch._dynamo.exc:TorchRuntimeError", _CAPTURE),
    "BackendCompilerFailed": PrivateName("torch._dynamo.exc:BackendCompilerFailed", _CAPTURE),
    # Not a failure: Dynamo traces again, with fewer symbols.
    "RestartAnalysis": PrivateName("torch._dynamo.exc:RestartAnalysis", _BACKEND),
    # Whether Dynamo makes weights constants of the graph that it traces.
    "is_parameter_freezing": PrivateName("torch._dynamo.utils:is_parameter_freezing", _BACKEND),
    # Differentiates a graph ahead of time.
    "aot_autograd": PrivateName("torch._dynamo.backends.common:aot_autograd", _BACKEND),
    # What ``torch.utils.checkpoint`` becomes in a graph of Dynamo.
    "tag_activation_checkpoint": PrivateName(
        "torch._higher_order_ops.wrap:tag_activation_checkpoint", _BACKEND
    ),
    # A scatter without bounds checks, as decompositions write it.
    "unsafe_index_put": PrivateName("torch:ops.aten._unsafe_index_put.default", _BACKEND),
    # Symbolic sizes: an environment of their own for one group, and the algebra of sizes.
    "ConstantSource": PrivateName("torch._dynamo.source:ConstantSource", _SHAPES),
    "TensorifyState": PrivateName("torch._dynamo.symbolic_convert:TensorifyState", _SHAPES),
    "preserve_rng_state": PrivateName("torch._dynamo.utils:preserve_rng_state", _SHAPES),
    "enable_python_dispatcher": PrivateName(
        "torch._dispatch.python:enable_python_dispatcher", _SHAPES
    ),
    # The number that a symbolic size was traced with.
    "optimization_hint": PrivateName(
        "torch.fx.experimental.symbolic_shapes:optimization_hint",
        _CAPTURE,
        older=(
            "torch.fx.experimental.symbolic_shapes:size_hint",  # 2.10 to 2.12
            "torch.fx.experimental.symbolic_shapes:hint_int",  # 2.9
        ),
    ),
    "FloorDiv": PrivateName("torch.utils._sympy.functions:FloorDiv", _SHAPES),
    "Max": PrivateName("torch.utils._sympy.functions:Max", _SHAPES),
    "Mod": PrivateName("torch.utils._sympy.functions:Mod", _SHAPES),
    "PythonPrinter": PrivateName("torch.utils._sympy.printers:PythonPrinter", _SHAPES),
    "SymT": PrivateName("torch.utils._sympy.symbol:SymT", _SHAPES),
    "symbol_is_type": PrivateName("torch.utils._sympy.symbol:symbol_is_type", _SHAPES),
}
"""Name in this module -> torch's."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A name of the table; a type checker sees those imported above."""
        if name not in NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = NAMES[name].find()
        return found


READ: dict[str, PrivateName] = {}
"""Function of this module -> the private attribute that it reads."""


def reads(path: str, feature: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Marks a function that reads one private attribute; without it, one clear error is raised.

    Args:
        path: ``module:attribute``, or ``module:class.attribute``; the attribute comes last.
        feature: see :class:`PrivateName`.
    """
    private = PrivateName(path, feature)
    attribute = path.replace(":", ".").rpartition(".")[2]

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        READ[function.__name__] = private

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except AttributeError as error:
                if error.name != attribute:
                    raise
                raise private.missing() from error

        return checked

    return mark


# -- Tensors ----------------------------------------------------------------------------------


@reads("torch:UntypedStorage._cdata", _CAPTURE)
def storage_key(tensor: torch.Tensor) -> int:
    """A number that tensors of one storage have in common, fake ones too."""
    return int(tensor.untyped_storage()._cdata)


@reads("torch:Tensor._version", "inner='depth_first'")
def was_written(tensor: torch.Tensor) -> bool:
    """Whether a tensor has been written in place since it was made."""
    return bool(tensor._version)


@reads("torch:Tensor._is_view", _SHAPES)
def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd takes a tensor for a view of another."""
    return bool(tensor._is_view())


@reads("torch._C:_functorch", _CAPTURE)
def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor wraps inside of ``vmap`` or ``torch.func.grad``; elsewhere itself."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


@reads("torch._C:_len_torch_dispatch_stack", _BACKEND)
def is_traced() -> bool:
    """Whether what runs now is being traced, on tensors without memory."""
    return bool(torch._C._len_torch_dispatch_stack())


@reads("torch:ScriptObject._type", _CAPTURE)
def script_class(value: Any) -> str:
    """The qualified name of the class of a script object, real or fake."""
    return str(getattr(value, "script_class_name", None) or value._type().qualified_name())


# -- Operators and functions ------------------------------------------------------------------


@reads("torch._ops:OpOverload._schema", _CAPTURE)
def schema_of(overload: OpOverload) -> Any:
    """The schema of an operator: name, arguments, returns, and what it writes."""
    return overload._schema


@reads("torch._ops:OpOverload._overloadname", "inner='depth_first'")
def overload_name(overload: OpOverload) -> str:
    """``"Tensor"`` of ``torch.ops.aten.add.Tensor``."""
    return str(overload._overloadname)


@reads("torch._ops:OpOverloadPacket._qualified_op_name", _CAPTURE)
def qualified_name(packet: OpOverloadPacket) -> str:
    """``"aten::add"`` of ``torch.ops.aten.add``."""
    return str(packet._qualified_op_name)


@reads("torch.library:CustomOpDef._qualname", "register_rule()")
def custom_op_name(op: Any) -> str:
    """``"mylib::relu"`` of what ``torch.library.custom_op("mylib::relu", ...)`` has made."""
    return str(op._qualname)


@reads("torch._C:_VariableFunctions", _CAPTURE)
def variable_functions() -> Any:
    """Where the functions are that ``torch`` re-exports."""
    return torch._C._VariableFunctions


@reads("torch._C:_nn", _CAPTURE)
def nn_functions() -> Any:
    """Where the compiled functions are that ``torch.nn.functional`` re-exports."""
    return torch._C._nn


def plain_pooling(name: str) -> Callable[..., Any]:
    """The function behind ``F.max_pool2d`` and the like, which has a signature.

    ``boolean_dispatch`` hides it behind a function called ``fn``.
    """
    path = f"torch.nn.functional:_{name}"
    found: Callable[..., Any] = PrivateName(path, _CAPTURE).find()
    return found


@reads("torch._C:_dispatch_has_kernel", _CAPTURE)
def has_kernel(overload: OpOverload) -> bool:
    """Whether tensors can be given to an operator: some are TorchScript's alone."""
    return bool(torch._C._dispatch_has_kernel(overload.name()))


class OneDnn(NamedTuple):
    """Operators of oneDNN on packed weights."""

    pack_convolution: Any
    pack_linear: Any
    convolution: Any
    convolution_add: Any
    linear: Any
    linear_add: Any


@functools.cache
def onednn() -> OneDnn:
    """The operators that the packed executor runs.

    Raises:
        UnsupportedTorchError: where this build of torch does not have them.
    """
    names = (
        "_reorder_convolution_weight",
        "_reorder_linear_weight",
        "_convolution_pointwise.default",
        "_convolution_pointwise.binary",
        "_linear_pointwise.default",
        "_linear_pointwise.binary",
    )
    paths = (f"torch:ops.mkldnn.{name}" for name in names)
    feature = "the packed executor of inner='auto'"
    return OneDnn(*(PrivateName(path, feature).find() for path in paths))


# -- FX graphs --------------------------------------------------------------------------------


@reads("torch.fx:Graph._codegen", _CAPTURE)
def codegen_of(graph: fx.Graph) -> Any:
    """What writes a graph's code: it knows how an exported program is called."""
    return graph._codegen


def keep_source(node: fx.Node, new: fx.Node) -> None:
    """Give a copy of a node the source, and with it a parameter's name, that Dynamo hung on it."""
    if hasattr(node, "_dynamo_source"):
        new._dynamo_source = node._dynamo_source


def mark_weight(node: fx.Node) -> None:
    """Make a placeholder one that :func:`is_dynamo_weight` takes for a weight."""
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def is_dynamo_weight(node: fx.Node) -> bool:
    """Whether a placeholder of a Dynamo graph is a parameter, a buffer or a module's attribute.

    ``_dynamo_static_input_type`` marks parameters and buffers; the guard source of everything
    that is reached through a module says so too.
    """
    tensor_dict = node.meta.get("tensor_dict") or {}
    if tensor_dict.get("_dynamo_static_input_type") is not None:
        return True
    guard = getattr(getattr(node, "_dynamo_source", None), "guard_source", None)
    if inspect.ismethod(guard):  # a property from torch 2.10 on
        guard = guard()
    return guard is not None and "NN_MODULE" in guard.name


# -- Dynamo -----------------------------------------------------------------------------------


@reads("torch._dynamo:lookup_backend", "inner= with a backend's name")
def lookup_backend(name: str) -> Callable[..., Any]:
    """The backend of torch.compile of that name."""
    found: Callable[..., Any] = importlib.import_module("torch._dynamo").lookup_backend(name)
    return found


@reads("torch._dynamo:config", _CAPTURE)
def dynamo_settings(**settings: Any) -> AbstractContextManager[Any]:
    """Settings of Dynamo while the context lasts."""
    found: AbstractContextManager[Any] = importlib.import_module("torch._dynamo").config.patch(
        **settings
    )
    return found


@reads("torch._guards:TracingContext", "report(model)")
def traced_code() -> CodeType | None:
    """The outermost code object of the frame that Dynamo is compiling."""
    context = importlib.import_module("torch._guards").TracingContext.try_get()
    traced = getattr(context, "traced_code", None) if context is not None else None
    return traced[0] if traced else None


@reads("torch._guards:TracingContext", _CAPTURE)
def drop_guards() -> None:
    """Forget, in a backend, the guards of the frame that Dynamo is compiling: it makes none then.

    For what is called once, with what it was compiled for; they take a tenth of a trace.
    """
    context = importlib.import_module("torch._guards").TracingContext.try_get()
    if context is not None:
        context.guards_context.dynamo_guards.inner.clear()


def compiled_apart(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """``torch.compile`` with a cache of its own, where torch has such (2.13, not 2.11)."""
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        settings["isolate_recompiles"] = True
    compiled: Callable[..., Any] = torch.compile(function, **settings)
    return compiled


def original_module(model: Any) -> Any:
    """The module in what ``torch.compile(module)`` returns; anything else is returned as it is."""
    return getattr(model, "_orig_mod", model)


def original_function(target: Any) -> Any:
    """The function in what ``torch.compile(function)`` returns; anything else as it is."""
    return getattr(target, "_torchdynamo_orig_callable", target)


def is_compiled_function(target: object) -> bool:
    """Whether a function is what ``torch.compile(function)`` returns."""
    return hasattr(target, "_torchdynamo_orig_callable")


def backend_of(model: object) -> object:
    """The backend in what ``torch.compile`` returned; ``None`` where it is not to be found.

    A compiled function has its context in its closure only.
    """
    compiled = getattr(model, "_compiled_call_impl", None) or model
    context = getattr(compiled, "dynamo_ctx", None)
    if context is None and is_compiled_function(compiled):
        context = inspect.getclosurevars(compiled).nonlocals.get("self")  # type: ignore[arg-type]
    callback: Any = getattr(context, "callback", None)
    # Each wrapper names the one inside of it; torch has a function for it from 2.10 on.
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return callback if callable(callback) else None


# -- Symbolic sizes ---------------------------------------------------------------------------


def hint_of(env: ShapeEnv, size: Any) -> int:
    """The number that an expression of sizes was traced with; torch before 2.13 calls it so."""
    hint: Any = getattr(env, "guarding_hint_or_throw", None) or env.size_hint
    return int(hint(size))


def traced_symbols(env: ShapeEnv) -> Mapping[Any, Any]:
    """Symbol -> the number that it was traced with; torch 2.9 has them under another name."""
    found = getattr(env, "backed_var_to_val", None)
    values: Mapping[Any, Any] = env.var_to_val if found is None else found
    return values


# -- Inductor ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class InductorFunction:
    """A function of inductor that a workaround replaces; see ``inner/inductor_patches/``.

    Attributes:
        module: that has it.
        name: of the function, after the name of its class if it has one.
        faulty: the versions of torch, as far as the minor number, that are known to have the fault
            which the workaround mends. It is not used on others.
    """

    module: str
    name: str
    faulty: tuple[str, ...]

    def place(self) -> tuple[Any, str]:
        """The module or class that has it, and its name there; imports inductor: seconds.

        Raises:
            UnsupportedTorchError: where inductor does not have it.
        """
        PrivateName(f"{self.module}:{self.name}", "inner='inductor'").find()
        owner, _, name = self.name.rpartition(".")
        module = importlib.import_module(self.module)
        return (getattr(module, owner) if owner else module), name


STRIDE_COMPARISON = InductorFunction(
    "torch._inductor.ir", "Layout._stride_expr_ge_or_false", ("2.13",)
)
"""Static: whether one stride is at least another, or a multiple of it."""
STRIDE_AT = InductorFunction("torch._inductor.sizevars", "stride_at", ("2.13", "2.14"))
"""How much an index grows in one step of a loop."""
SIMPLIFIED_INDEX = InductorFunction(
    "torch._inductor.sizevars", "simplify_index_in_vec_range", ("2.13", "2.14")
)
"""An index within one vector of a loop."""


def inductor_compile(gm: fx.GraphModule, example_inputs: Any, **settings: Any) -> Any:
    """What inductor makes of one ATen graph: its ``inner_compile``, which may be another."""
    path = "torch._inductor.compile_fx:compile_fx_inner"
    return PrivateName(path, "inner='inductor'").find()(gm, example_inputs, **settings)


def inductor_knows(condition: Any) -> bool:
    """Whether inductor, for the graph that it compiles, knows a condition on sizes to hold."""
    path = "torch._inductor.virtualized:V.graph.sizevars.guard_or_false"
    return bool(PrivateName(path, "inner='inductor'").find()(condition))
