"""Models by name, with random weights and no download: the MODEL argument of the command line.

A model is given by a library and its name there (``torchvision:mobilenet_v2``), by a callable
(``package.module:callable``) or by a file of ``torch.export`` (``model.pt2``). Every mistake in
a name raises a one-line :class:`ModelError` that suggests what to type instead.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from torch_getfuse.backend.torch_private import BatchNormBase, tree_leaves
from torch_getfuse.errors import GetfuseError, nearest

FORMS = (
    "torchvision:NAME, timm:NAME, transformers:NAME, package.module:callable "
    "or a .pt2 file of torch.export"
)

_SIDES = {"efficientnet_b3": 300, "inception_v3": 299}
_SIDE = 224
_DEEPLAB_SIDE = 513


class ModelError(GetfuseError):
    """A model, or its input shape, cannot be found, built or parsed."""


# -- torchvision ------------------------------------------------------------------------------

_declared: list[torch.library.Library] = []  # deleting a Library removes its schemas
_declaring = threading.Lock()


def import_torchvision() -> ModuleType:
    """``torchvision``, even with a torch build that its compiled operators do not match.

    torchvision's wheel contains operators compiled for one build of torch. With another (the CPU
    build) they do not load, and importing torchvision then fails while it registers shapes for
    ``torchvision::nms``. Classification and segmentation models do not need these operators, so
    only the schemas of two of them are declared here; calling them still raises. If the compiled
    operators load, or torchvision is imported already, nothing is declared.

    Raises:
        ModelError: if torchvision is not installed, or still cannot be imported.
    """
    with _declaring:
        if "torchvision" not in sys.modules:
            spec = importlib.util.find_spec("torchvision")
            if spec is None:
                raise _not_installed("torchvision")
            if not _has_operators(spec.submodule_search_locations or ()):
                library = torch.library.Library("torchvision", "DEF")
                for name in ("nms", "qnms"):
                    library.define(
                        f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    )
                _declared.append(library)
        return _import_library("torchvision")


def _has_operators(locations: Any) -> bool:
    """Whether ``torchvision::nms`` exists, after trying to load it from the installed package."""
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    files = [file for location in locations for file in sorted(Path(location).glob("_C*"))]
    for file in files:
        if file.suffix in (".so", ".pyd", ".dylib"):
            # A library for another torch has missing symbols; no part of it stays loaded.
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(file))
                return True
    return False


def _import_library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise _not_installed(name) from error
        raise ModelError(
            f"{name} is installed but cannot be imported ({_in_a_line(error)}); install the "
            f"version that goes with torch {torch.__version__}: pip install 'torch-getfuse[models]'"
        ) from error


def _not_installed(name: str) -> ModelError:
    return ModelError(f"{name} is not installed: pip install 'torch-getfuse[models]'")


# -- calibration ------------------------------------------------------------------------------


def calibrate_batch_norm(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Set the running statistics of every batch norm to those of ``x``; returns ``model``.

    With random weights and the initial statistics, activations of a deep network vanish or
    explode, so that comparing two results is meaningless. After this pass they do not. Only batch
    norms run in training mode: dropout and stochastic depth stay off, so the result depends only
    on the weights and ``x``. Modes and momentum are restored.

    Args:
        model: changed in place (running statistics only).
        x: an input, mostly ``(N, C, H, W)``; N must be at least 2 if a map shrinks to 1x1.

    Raises:
        ModelError: if a batch norm gets a single value per channel.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [m for m, _ in modes if isinstance(m, BatchNormBase) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average, here over this single batch
            norm.train()
        with torch.no_grad():
            model(x)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ModelError(
            f"a batch norm has one value per channel for an input of {_shape_text(x.shape)}, "
            "too few for statistics; give a batch of 2 or more"
        ) from error
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return model


# -- loading ----------------------------------------------------------------------------------


def load_model(spec: str, *, seed: int = 0) -> nn.Module | ExportedProgram:
    """The model given by ``spec``, in eval mode, with random weights drawn from ``seed``.

    Nothing is downloaded, and the state of torch's generator is preserved. A ``transformers``
    model is built from the default configuration of the model type in its name, and wrapped so
    that it takes only the image batch and returns the logits.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, ``transformers:NAME``,
            ``package.module:callable`` (found from the current directory too; called without
            arguments) or a path that ends in ``.pt2``.
        seed: seed of the random weights.

    Raises:
        ModelError: if there is no such library, model, file or callable, or building it raises.
    """
    if spec.endswith(".pt2"):
        return _load_exported(spec)
    library, name = _parse_spec(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _LIBRARIES[library](name) if library in _LIBRARIES else _call(library, name)
    return model.eval() if isinstance(model, nn.Module) else model


def default_input(spec: str) -> tuple[int, ...]:
    """The usual input shape, batch first, of the model given by ``spec``.

    1x3x224x224, except for models with another usual size: 300 for ``efficientnet_b3``, 513 for
    ``deeplabv3``, the size in timm's and transformers' configurations, that of a ``.pt2`` file.

    Raises:
        ModelError: as :func:`load_model`, if the library is needed for the size; and for a file
            whose program does not take exactly one tensor.
    """
    if spec.endswith(".pt2"):
        return _exported_input(spec, _load_exported(spec))
    library, name = _parse_spec(spec)
    if library == "timm":
        timm = _import_timm()
        _check_name("timm", name.partition(".")[0], timm.list_models())
        size = timm.get_pretrained_cfg(name, allow_unregistered=True).input_size
        return (1, *map(int, size))
    if library == "transformers":
        config = _transformers_config(name)
        side = getattr(config, "image_size", None) or _SIDE
        high, wide = side if isinstance(side, list | tuple) else (side, side)
        return (1, int(getattr(config, "num_channels", 3)), int(high), int(wide))
    side = _SIDE
    if library == "torchvision":
        side = _DEEPLAB_SIDE if name.startswith("deeplabv3") else _SIDES.get(name, _SIDE)
    return (1, 3, side, side)


def parse_input(text: str) -> tuple[int, ...]:
    """``"1x3x224x224"`` -> ``(1, 3, 224, 224)``.

    Raises:
        ModelError: for anything but positive integers separated by ``x``.
    """
    if re.fullmatch(r"[0-9]+(x[0-9]+)*", text):
        shape = tuple(map(int, text.split("x")))
        if 0 not in shape:
            return shape
        raise ModelError(f"input shape {text!r} has a size of 0: every size is at least 1")
    numbers = re.findall(r"[0-9]+", text)
    plain = re.fullmatch(r"[0-9\s,;xX×*()\[\]]+", text)
    hint = f"; did you mean {'x'.join(numbers)!r}?" if plain and numbers else ""
    raise ModelError(
        f"input shape {text!r} is not sizes with 'x' between them, like '1x3x224x224'{hint}"
    )


def _parse_spec(spec: str) -> tuple[str, str]:
    library, colon, name = spec.partition(":")
    if colon and library and name:
        return library, name
    hint = nearest(f"torchvision:{spec.strip(':')}", _known_specs())
    if not colon and os.path.exists(spec):
        hint = "; a file must be a program saved by torch.export.save, with the suffix .pt2"
    raise ModelError(f"{spec!r} is not a model: expected {FORMS}{hint}")


def _known_specs() -> list[str]:
    if importlib.util.find_spec("torchvision") is None:
        return []
    return [f"torchvision:{name}" for name in import_torchvision().models.list_models()]


def _check_name(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise ModelError(
            f"{library} has no model {name!r}"
            + (nearest(name, known) or f"; {library}'s own list has all {len(known)} names")
        )


def _torchvision_model(name: str) -> nn.Module:
    models = import_torchvision().models
    _check_name("torchvision", name, models.list_models())
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    # Segmentation and detection models would download a backbone by default.
    options: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in parameters else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # the default, which warns unless it is passed explicitly
    model: nn.Module = _built(
        f"torchvision:{name}", lambda: models.get_model(name, weights=None, **options)
    )
    return model


def _import_timm() -> Any:
    if importlib.util.find_spec("timm") is None:
        raise _not_installed("timm")
    import_torchvision()
    return _import_library("timm")


def _timm_model(name: str) -> nn.Module:
    timm = _import_timm()
    _check_name("timm", name.partition(".")[0], timm.list_models())
    model: nn.Module = _built(f"timm:{name}", lambda: timm.create_model(name, pretrained=False))
    return model


class _Logits(nn.Module):
    """An image classifier of transformers as a function of one tensor to one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        result = self.model(pixel_values=pixel_values)
        # Some have no field of that name: their first is it.
        logits: torch.Tensor = result.logits if "logits" in result else result[0]
        return logits


def _transformers_config(name: str) -> Any:
    """The default configuration of the model type that ``name`` contains."""
    if importlib.util.find_spec("transformers") is None:
        raise _not_installed("transformers")
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    _import_library("transformers")
    auto = _import_library("transformers.models.auto.configuration_auto")
    names = _import_library("transformers.models.auto.modeling_auto")
    known = sorted(names.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    # "microsoft/resnet-50" -> "-resnet-50-", which holds "-resnet-" but not "-res-".
    words = "-" + re.sub(r"[^a-z0-9]+", "-", name.rpartition("/")[2].lower()) + "-"
    held = [kind for kind in known if f"-{re.sub('[^a-z0-9]+', '-', kind)}-" in words]
    if not held:
        hint = nearest(words.strip("-"), known) or nearest(words.split("-")[1], known)
        raise ModelError(
            f"no image classifier of transformers is named in {name!r}{hint or ''}; "
            "build any other with package.module:callable"
        )
    return _built(f"transformers:{name}", lambda: auto.CONFIG_MAPPING[max(held, key=len)]())


def _transformers_model(name: str) -> nn.Module:
    config = _transformers_config(name)
    names = _import_library("transformers.models.auto.modeling_auto")
    classes = names.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[config.model_type]
    if not isinstance(classes, str):  # of several, as DeiT with and without a teacher, the first
        config.architectures = [classes[0]]
    auto = _import_library("transformers").AutoModelForImageClassification
    return _Logits(_built(f"transformers:{name}", lambda: auto.from_config(config)))


_LIBRARIES: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": _torchvision_model,
    "timm": _timm_model,
    "transformers": _transformers_model,
}


def _call(module_name: str, path: str) -> nn.Module | ExportedProgram:
    """The result of the callable at ``path`` in a module of the user's."""
    spec = f"{module_name}:{path}"
    with _current_directory():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise _raised(f"importing {module_name}", error) from error
            raise ModelError(
                f"{spec!r}: there is no library or module {error.name!r}"
                + (nearest(module_name, _LIBRARIES) or f" here or installed; expected {FORMS}")
            ) from error
        except Exception as error:
            raise _raised(f"importing {module_name}", error) from error
        try:
            target = functools.reduce(getattr, path.split("."), module)
        except AttributeError as error:
            public = [name for name in vars(module) if not name.startswith("_")]
            raise ModelError(
                f"{spec!r}: module {module_name} has no {path!r}"
                + (nearest(path, public) or "; name a callable that returns the model")
            ) from error
        if isinstance(target, nn.Module | ExportedProgram):
            return target  # a model is callable too, but calling it does not return a model
        if not callable(target):
            raise ModelError(
                f"{spec!r} is a {type(target).__name__}; name a callable that returns the model"
            )
        model = _built(spec, target)
    if not isinstance(model, nn.Module | ExportedProgram):
        raise ModelError(
            f"{spec!r} returned a {type(model).__name__}; it must return a torch.nn.Module or "
            "an ExportedProgram"
        )
    return model


@contextlib.contextmanager
def _current_directory() -> Iterator[None]:
    """Make modules of the current directory importable, as with ``python -m``."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(here)


def _built(spec: str, build: Callable[[], Any]) -> Any:
    """``build()``, with any exception turned into a :class:`ModelError` about ``spec``."""
    try:
        return build()
    except Exception as error:
        raise _raised(f"building {spec!r}", error) from error


def _raised(doing: str, error: Exception) -> ModelError:
    return ModelError(
        f"{doing} raised {_in_a_line(error)}; try it in Python for the full traceback"
    )


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _load_exported(path: str) -> ExportedProgram:
    if not os.path.isfile(path):
        folder = Path(path).parent
        there = sorted(str(p) for p in folder.glob("*.pt2")) if folder.is_dir() else []
        raise ModelError(
            f"there is no file {path!r}" + (nearest(path, there) or "; check the path")
        )
    try:
        return torch.export.load(path)
    except Exception as error:  # zip, json, version and schema errors have no common base
        raise ModelError(
            f"{path!r} cannot be read as an exported program ({_in_a_line(error)}); save one "
            f"with torch.export.save and torch {torch.__version__}"
        ) from error


def _exported_input(path: str, program: ExportedProgram) -> tuple[int, ...]:
    wanted = set(program.graph_signature.user_inputs)
    values = [
        n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in wanted
    ]
    if len(values) != 1 or not isinstance(values[0], torch.Tensor):
        raise ModelError(f"{path!r} takes {len(values)} inputs; only one tensor can be made for it")
    example = program.example_inputs
    if example is not None:
        return tuple(tree_leaves(example)[0].shape)
    if not all(isinstance(size, int) for size in values[0].shape):
        raise ModelError(
            f"{path!r} has sizes that vary ({_shape_text(values[0].shape)}): give --input"
        )
    return tuple(values[0].shape)


def _shape_text(shape: torch.Size) -> str:
    return "x".join(map(str, shape))
