"""Models by name: the right ones load, and every mistake is one clear line."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from torch_getfuse.errors import GetfuseError
from torch_getfuse.models import (
    ModelError,
    calibrate_batch_norm,
    default_input,
    import_torchvision,
    load_model,
    parse_input,
)

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def python(code: str) -> str:
    """What a fresh interpreter prints for ``code``."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- torchvision ------------------------------------------------------------------------------


@needs_torchvision
def test_torchvision_imports_even_after_a_failed_import() -> None:
    out = python(
        "import sys\n"
        "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n"
        "from torch_getfuse.models import import_torchvision\n"
        "a = import_torchvision(); b = import_torchvision()\n"
        "print(a is b is sys.modules['torchvision'], a.models.resnet18 is not None)\n"
    )
    assert out.split() == ["True", "True"]


@needs_torchvision
def test_nms_still_raises_where_it_is_only_declared() -> None:
    torchvision = import_torchvision()
    if torchvision.extension._has_ops():
        pytest.skip("this torchvision is whole")
    with pytest.raises(NotImplementedError):
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    with pytest.raises(RuntimeError):
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


@needs_torchvision
def test_nothing_is_declared_where_the_operators_are_there() -> None:
    out = python(
        "import torch\n"
        "library = torch.library.Library('torchvision', 'DEF')\n"
        "for name in ('nms', 'qnms'):\n"
        "    library.define(f'{name}(Tensor dets, Tensor scores, float t) -> Tensor')\n"
        "from torch_getfuse import models\n"
        "models.import_torchvision()\n"
        "print(len(models._declared))\n"
    )
    assert out.split() == ["0"]


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    for library in ("torchvision", "timm", "transformers"):
        with pytest.raises(ModelError, match=rf"{library} is not installed: pip install"):
            load_model(f"{library}:resnet18")


# -- calibration ------------------------------------------------------------------------------


class Small(nn.Module):
    """Two batch norms, one without statistics, noise between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, momentum=0.3)
        self.bare = nn.BatchNorm2d(4, track_running_stats=False)
        self.drop = nn.Dropout(0.5)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.bare(self.norm(self.conv(x)))))


@pytest.mark.parametrize("train", [False, True])
def test_calibration_sets_statistics_and_nothing_else(train: bool) -> None:
    torch.manual_seed(0)
    model = Small().train(train)
    model.drop.train(not train)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8) * 5 + 2
    assert calibrate_batch_norm(model, x) is model
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert (model.norm.momentum, model.last.momentum) == (0.3, 0.1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))
    y = model.conv(x)
    assert torch.allclose(model.norm.running_mean, y.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model.norm.running_var, y.transpose(0, 1).flatten(1).var(1), rtol=1e-4)

    first = copy.deepcopy(model.state_dict())
    torch.manual_seed(99)  # neither noise nor an earlier pass may show
    calibrate_batch_norm(model, x)
    assert all(torch.equal(first[key], value) for key, value in model.state_dict().items())


def test_calibration_of_one_value_per_channel() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).eval()
    with pytest.raises(ModelError, match=r"input of 1x3x4x4.*batch of 2 or more"):
        calibrate_batch_norm(model, torch.randn(1, 3, 4, 4))
    assert not model[1].training


@needs_torchvision
def test_calibrated_output_is_of_ordinary_size() -> None:
    model = load_model("torchvision:mobilenet_v2")
    assert isinstance(model, nn.Module)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        calibrate_batch_norm(model, x)
        assert 1e-3 < model(x).std() < 1e3


# -- loading ----------------------------------------------------------------------------------


@needs_torchvision
def test_torchvision_models_are_seeded_and_leave_the_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two = load_model("torchvision:squeezenet1_1"), load_model("torchvision:squeezenet1_1")
    other = load_model("torchvision:squeezenet1_1", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(one, nn.Module)
    assert isinstance(two, nn.Module)
    assert isinstance(other, nn.Module)
    assert not one.training
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert not all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))


@needs_torchvision
def test_segmentation_models_download_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    model = load_model("torchvision:deeplabv3_mobilenet_v3_large")
    assert isinstance(model, nn.Module)


@needs_timm
def test_timm_model() -> None:
    model = load_model("timm:resnet10t")
    assert isinstance(model, nn.Module)
    assert not model.training
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@needs_transformers
@pytest.mark.parametrize(
    ("name", "kind", "side"),
    [
        ("microsoft/resnet-50", "resnet", 64),
        ("google/mobilenet_v2_1.0_224", "mobilenet_v2", 64),
        ("regnet", "regnet", 64),
        ("pp_lcnet", "pp_lcnet", 64),  # without a field for logits
        ("facebook/levit-128S", "levit", 224),  # of two classes, with and without a teacher
    ],
)
def test_transformers_model(name: str, kind: str, side: int) -> None:
    model = load_model(f"transformers:{name}")
    assert isinstance(model, nn.Module)
    assert model.model.config.model_type == kind
    logits = model(torch.randn(1, 3, side, side))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape[0] == 1


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with a module ``user_models`` that imports from no elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user_models.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def net():\n    return nn.Conv2d(3, 4, 1)\n"
        "class Makers:\n    net = staticmethod(net)\n"
        "ready = nn.ReLU()\n"
        "number = 3\n"
        "def wrong():\n    return 3\n"
        "def raises():\n    raise KeyError('no such\\nthing')\n"
    )
    (tmp_path / "user_broken.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "user_raises.py").write_text("1 / 0\n")
    for name in ("user_models", "user_broken", "user_raises"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_callables_of_the_current_directory() -> None:
    path = list(sys.path)
    for spec in ("user_models:net", "user_models:Makers.net"):
        model = load_model(spec)
        assert isinstance(model, nn.Conv2d)
        assert not model.training
    assert isinstance(load_model("user_models:ready"), nn.ReLU)
    assert sys.path == path


def test_exported_file(here: Path) -> None:
    program = torch.export.export(nn.Conv2d(3, 4, 1).eval(), (torch.randn(2, 3, 6, 5),))
    torch.export.save(program, here / "conv.pt2")
    assert isinstance(load_model("conv.pt2"), ExportedProgram)
    assert default_input(str(here / "conv.pt2")) == (2, 3, 6, 5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("user_models:nett", "module user_models has no 'nett'; did you mean 'net'"),
        ("user_models:Makers.other", "has no 'Makers.other'"),
        ("user_models:number", "is a int; name a callable"),
        ("user_models:wrong", "returned a int; it must return a torch.nn.Module"),
        ("user_models:raises", "building 'user_models:raises' raised KeyError: 'no such"),
        ("user_broken:net", "importing user_broken raised ModuleNotFoundError"),
        ("user_raises:net", "importing user_raises raised ZeroDivisionError"),
        ("not_there.models:net", "there is no library or module 'not_there'"),
        ("torchvison:resnet18", "no library or module 'torchvison'; did you mean 'torchvision'"),
        ("user_models.py", "a file must be a program saved by torch.export.save"),
        ("qqqq", "'qqqq' is not a model: expected torchvision:NAME"),
        ("torchvision:", "is not a model"),
        (":net", "is not a model"),
        ("", "is not a model"),
        ("con.pt2", "there is no file 'con.pt2'; check the path"),
        ("bad.pt2", "'bad.pt2' cannot be read as an exported program"),
        ("bod.pt2", "there is no file 'bod.pt2'; did you mean 'bad.pt2'"),
    ],
)
def test_mistakes_are_one_line(here: Path, spec: str, message: str) -> None:
    if spec.startswith("b"):
        (here / "bad.pt2").write_bytes(b"not a zip")
    with pytest.raises(ModelError) as raised:
        load_model(spec)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, GetfuseError)


@needs_torchvision
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:mobilenetv2", "has no model 'mobilenetv2'; did you mean 'mobilenet_v2'"),
        ("mobilenet_v2", "did you mean 'torchvision:mobilenet_v2'"),
        ("torchvision:qqqqqqqq", "torchvision has no model 'qqqqqqqq'; torchvision's own list"),
    ],
)
def test_torchvision_suggestions(spec: str, message: str) -> None:
    with pytest.raises(ModelError) as raised:
        load_model(spec)
    assert message in str(raised.value)


@needs_timm
def test_timm_suggestion() -> None:
    for function in (load_model, default_input):
        with pytest.raises(ModelError, match="timm has no model 'resnet5O'; did you mean"):
            function("timm:resnet5O")


@needs_transformers
@pytest.mark.parametrize(
    ("name", "message"),
    [("bert-base-uncased", "no image classifier of transformers"), ("resnt-50", "'resnet'")],
)
def test_transformers_mistakes(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(f"transformers:{name}")


# -- input shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("torchvision:mobilenet_v2", (1, 3, 224, 224)),
        ("torchvision:efficientnet_b3", (1, 3, 300, 300)),
        ("torchvision:deeplabv3_mobilenet_v3_large", (1, 3, 513, 513)),
        ("my.module:net", (1, 3, 224, 224)),
        pytest.param("timm:inception_v3", (1, 3, 299, 299), marks=needs_timm),
        pytest.param(
            "transformers:microsoft/resnet-50", (1, 3, 224, 224), marks=needs_transformers
        ),
    ],
)
def test_default_input(spec: str, shape: tuple[int, ...]) -> None:
    assert default_input(spec) == shape


def test_default_input_of_several_or_varying_inputs(here: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    two = torch.export.export(Two(), (torch.randn(2), torch.randn(2)))
    torch.export.save(two, here / "two.pt2")
    with pytest.raises(ModelError, match="takes 2 inputs"):
        default_input("two.pt2")


def test_parse_input() -> None:
    assert parse_input("1x3x224x224") == (1, 3, 224, 224)
    assert parse_input("7") == (7,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,3,224,224", "did you mean '1x3x224x224'"),
        ("1X3 x 8", "did you mean '1x3x8'"),
        ("(1, 3, 8, 8)", "did you mean '1x3x8x8'"),
        ("1x0x8x8", "has a size of 0"),
        ("1x3x-8x8", "is not sizes with 'x' between them"),
        ("1x3x2.5", "is not sizes"),
        ("", "is not sizes"),
        ("image", "is not sizes"),
    ],
)
def test_parse_input_mistakes(text: str, message: str) -> None:
    with pytest.raises(ModelError) as raised:
        parse_input(text)
    assert message in str(raised.value)
