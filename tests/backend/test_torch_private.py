"""torch's private names: one file has them, each is there, and a missing one is a clear error."""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import torch_getfuse
from torch_getfuse import errors
from torch_getfuse.backend import torch_private
from torch_getfuse.backend.packed import fast
from torch_getfuse.backend.torch_versions import TRIED

ROOT = Path(torch_getfuse.__file__).parent
HOME = ROOT / "backend" / "torch_private.py"
FILES = sorted(file for file in ROOT.rglob("*.py") if file != HOME)

OTHERS = {"_option_string_actions"}
"""Private names of other libraries (argparse)."""


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def read(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def own_names() -> set[str]:
    """Private names that the package itself defines: functions, variables, attributes, fields."""
    found: set[str] = set()
    for node in (node for file in FILES for node in ast.walk(read(file))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (leaf for one in targets for leaf in ast.walk(one)):
                if isinstance(target, ast.Name):
                    found.add(target.id)
                elif isinstance(target, ast.Attribute) and of_self(target):
                    found.add(target.attr)
            if isinstance(node.value, ast.Tuple):  # __slots__
                found.update(e.value for e in node.value.elts if is_text(e))
    return {name for name in found if private(name)}


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def known_names() -> set[str]:
    """Private names that torch_private.py uses: of torch, whatever the package calls its own."""
    text = HOME.read_text(encoding="utf-8")
    return {name for name in re.findall(r"\b_[A-Za-z]\w*", text) if private(name)} - {"_BACKEND"}


def private_uses(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """The places where a file uses a private name of torch."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
            names = [part for module in modules for part in module.split(".")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute) and not of_self(node) and node.attr not in own:
            names = [node.attr]
        elif isinstance(node, ast.Call):
            called = node.func
            name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
            if name in ("getattr", "hasattr", "setattr", "delattr", "attrgetter"):
                names = [part for a in node.args if is_text(a) for part in a.value.split(".")]  # type: ignore[attr-defined]
                names = [part for part in names if part not in own]
        yield from (f"line {node.lineno}: {name}" for name in names if private(name))  # type: ignore[attr-defined]


OWN = own_names() - known_names() | OTHERS


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_file_uses_private_names_of_torch(file: Path) -> None:
    assert list(private_uses(read(file), OWN)) == [], (
        f"{file.relative_to(ROOT.parent)} uses private names of torch; give each a function or an "
        "entry of NAMES in torch_getfuse/backend/torch_private.py"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "from torch._guards import tracing",
        "from torch.utils import _pytree as pytree",
        "torch._C._set_grad_enabled(True)",
        "x = torch.ops.mkldnn._reorder_linear_weight",
        "target._schema.arguments",
        "value.untyped_storage()._cdata",
        "getattr(model, '_orig_mod', model)",
        "hasattr(node, '_dynamo_source')",
        "operator.attrgetter('graph._codegen')(gm)",
    ],
)
def test_the_test_sees_private_names(code: str) -> None:
    assert list(private_uses(ast.parse(code), OWN))


def test_what_is_no_name_of_torch_is_left_alone() -> None:
    code = "self._schema = 1\nplan._in_order\nx.__class__\nfrom torch_getfuse import _x\n"
    assert list(private_uses(ast.parse(code), OWN)) == []


# -- Every name is there, on the version that is installed ------------------------------------


@pytest.mark.parametrize("name", torch_private.NAMES)
def test_a_name_is_torchs(name: str) -> None:
    entry = torch_private.NAMES[name]
    assert getattr(torch_private, name) is entry.find()


@pytest.mark.parametrize("function", torch_private.READ)
def test_an_attribute_is_torchs(function: str) -> None:
    entry = torch_private.READ[function]
    # Attributes of instances are read by the tests below.
    if function not in ("codegen_of", "overload_name", "qualified_name", "schema_of"):
        entry.find()


def test_onednn_and_poolings() -> None:
    assert all(map(callable, torch_private.onednn()))
    names = ("max_pool1d", "adaptive_max_pool2d")
    for name in names:
        assert torch_private.plain_pooling(name).__name__ == f"_{name}"


def test_operators() -> None:
    add = torch.ops.aten.add
    assert torch_private.schema_of(add.Tensor).name == "aten::add"
    assert torch_private.overload_name(add.Tensor) == "Tensor"
    assert torch_private.qualified_name(add) == "aten::add"
    assert torch_private.variable_functions().conv2d is torch.conv2d
    assert torch_private.nn_functions().gelu is nn.functional.gelu


def test_tensors() -> None:
    x = torch.zeros(4)
    assert torch_private.storage_key(x) == torch_private.storage_key(x[1:])
    assert torch_private.storage_key(x) != torch_private.storage_key(x.clone())
    assert not torch_private.is_view(x)
    assert torch_private.is_view(x[1:])
    assert not torch_private.was_written(x)
    x.add_(1)
    assert torch_private.was_written(x)
    assert torch_private.unwrapped(x) is x
    inside = []
    torch.vmap(lambda row: inside.append(torch_private.unwrapped(row)) or row)(x)
    assert inside[0] is x
    assert not torch_private.is_traced()
    traced = []
    make_fx(lambda y: traced.append(torch_private.is_traced()) or y + 1, tracing_mode="fake")(x)
    assert traced == [True]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("bias", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x + self.bias


def test_what_torch_marks_its_objects_with() -> None:
    model = Scaled()
    graphs: list[fx.GraphModule] = []
    codes: list[types.CodeType | None] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        codes.append(torch_private.traced_code())
        return gm.forward

    compiled = torch.compile(model, backend=keep)
    compiled(torch.zeros(1, 2))
    assert torch_private.original_module(compiled) is model
    assert torch_private.original_module(model) is model
    assert torch_private.backend_of(compiled) is not None
    assert torch_private.backend_of(model) is None
    function = torch.compile(private, backend=keep)
    assert torch_private.is_compiled_function(function)
    assert torch_private.original_function(function) is private
    assert torch_private.backend_of(function) is not None
    assert not torch_private.is_compiled_function(private)
    assert codes == [Scaled.forward.__code__]
    inputs = graphs[0].graph.find_nodes(op="placeholder")
    assert [torch_private.is_dynamo_weight(node) for node in inputs] == [True, False, True]
    graph = fx.Graph()
    graph.set_codegen(torch_private.codegen_of(graphs[0].graph))
    new = graph.placeholder("x")
    assert not torch_private.is_dynamo_weight(new)
    torch_private.keep_source(inputs[0], new)
    assert torch_private.is_dynamo_weight(new)
    other = graph.placeholder("y")
    torch_private.mark_weight(other)
    assert torch_private.is_dynamo_weight(other)
    with torch_private.dynamo_settings(suppress_errors=True):
        assert torch._dynamo.config.suppress_errors
    assert torch_private.lookup_backend("eager") is torch._dynamo.lookup_backend("eager")


# -- On a version of torch without a name -----------------------------------------------------


def check(error: BaseException, name: str, feature: str) -> None:
    text = str(error)
    for part in (torch.__version__, name, feature, f"pip install 'torch=={TRIED[-1]}.*'"):
        assert part in text


def test_a_missing_name_is_named_where_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses import fake_tensor

    monkeypatch.delattr(fake_tensor, "FakeTensor")
    monkeypatch.delitem(vars(torch_private), "FakeTensor", raising=False)
    with pytest.raises(errors.UnsupportedTorchError) as raised:
        exec("from torch_getfuse.backend.torch_private import FakeTensor", {})
    check(raised.value, "torch._subclasses.fake_tensor.FakeTensor", "the capture of a model")


def test_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = torch_private.PrivateName("torch._gone.now:Name", "this test")
    with pytest.raises(errors.UnsupportedTorchError) as raised:
        entry.find()
    check(raised.value, "torch._gone.now.Name", "this test")


def test_an_older_place_is_looked_up_after_the_newer() -> None:
    entry = torch_private.PrivateName(
        "torch._gone:Name", "this test", older=("torch:_gone", "torch:Tensor")
    )
    assert entry.find() is torch.Tensor
    with pytest.raises(errors.UnsupportedTorchError) as raised:
        torch_private.PrivateName("torch._gone:Name", "this test", older=("torch:_gone",)).find()
    check(raised.value, "torch._gone", "this test")


def test_a_missing_attribute_is_named() -> None:
    with pytest.raises(errors.UnsupportedTorchError) as raised:
        torch_private.schema_of(types.SimpleNamespace())  # type: ignore[arg-type]
    check(raised.value, "torch._ops.OpOverload._schema", "the capture of a model")


def test_other_attribute_errors_stay_what_they_are() -> None:
    with pytest.raises(AttributeError, match="untyped_storage"):
        torch_private.storage_key(types.SimpleNamespace())  # type: ignore[arg-type]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = torch_private.nothing_of_the_kind  # type: ignore[attr-defined]


@pytest.mark.fast_program
def test_without_onednn_groups_run_as_fx_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the packed executor is off, and the report says why."""

    def gone() -> None:
        raise torch_private.PrivateName("torch:ops.mkldnn._gone", "the packed executor").missing()

    monkeypatch.setattr(fast, "onednn", gone)
    model = nn.Conv2d(3, 4, 3).eval()
    x = torch.rand(1, 3, 8, 8)
    compiled = torch.compile(model, backend="getfuse", options={"strict": True})
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    (section,) = torch_getfuse.report(compiled).sections
    assert any("torch.ops.mkldnn._gone" in note for note in section.notes)
