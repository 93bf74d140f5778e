"""One fingerprint however a network is captured: a survey of public networks.

    python benchmarks/fingerprints.py results.jsonl [torchvision:resnet18 ...]

Each network, with random weights and a small input, is captured in four ways: ``plan(model, x)``,
``torch.export``, and ``torch.compile`` with and without ``no_grad``. A line of the file is one
network; those that are in it already are not captured again. Without names: torchvision's
classification and segmentation networks, one of each of timm's families, and one of each of the
image classifiers of transformers, cut to two layers. Each runs in a process of its own for
``--limit`` seconds at most. Exits with 1 where the fingerprints of a network differ.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import fx, nn

from torch_getfuse.backend.capture.capture import capture_exported, capture_fx, capture_model
from torch_getfuse.errors import GetfuseError
from torch_getfuse.models import default_input, import_torchvision, load_model

_SMALL = ("test", "atto", "femto", "pico", "nano", "zepto", "xxt", "tiny", "mini", "xxs", "small")


def networks() -> list[str]:
    """The names of the survey."""
    vision = import_torchvision()
    import timm.models._registry as registry
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
    )

    def size(name: str) -> tuple[int, int, str]:
        rank = next((k for k, word in enumerate(_SMALL) if word in name), len(_SMALL))
        return rank, len(name), name

    families = registry._module_to_models.values()
    modules = (vision.models, vision.models.segmentation)
    return [
        *(f"torchvision:{name}" for m in modules for name in vision.models.list_models(module=m)),
        *sorted(f"timm:{min(names, key=size)}" for names in families),
        *(f"transformers:{kind}" for kind in sorted(CLASSIFIERS)),
    ]


def build(spec: str) -> tuple[nn.Module, torch.Tensor]:
    """A network and its input; the smallest side that it is known to take."""
    library, _, name = spec.partition(":")
    shape = default_input(spec)
    if library == "transformers":
        from transformers import AutoModelForImageClassification as Auto

        from torch_getfuse.models import _Logits, _transformers_config

        config = _transformers_config(name)
        if isinstance(getattr(config, "num_hidden_layers", None), int):
            config.num_hidden_layers = min(2, config.num_hidden_layers)
        return _Logits(Auto.from_config(config)).eval(), torch.randn(shape)
    model = load_model(spec)
    assert isinstance(model, nn.Module)
    if library == "torchvision":
        fixed = name.startswith(("vit", "maxvit")) or "inception" in name
        shape = shape if fixed else (1, 3, 64, 64)
    else:
        import timm

        cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
        if not cfg.fixed_input_size:
            least = cfg.min_input_size or (3, 64, 64)
            shape = (1, 3, *(max(64, side) for side in least[1:]))
    return model, torch.randn(shape)


def captures(model: nn.Module, x: torch.Tensor) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """The ways, and what gives their fingerprints: one of each graph."""

    def compiled(grad: bool) -> list[str]:
        found: list[str] = []

        def backend(gm: fx.GraphModule, inputs: Any) -> Any:
            found.append(capture_fx(gm, inputs).graph.fingerprint)
            return gm.forward

        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            torch.compile(model, backend=backend)(x)
        return found

    yield "plan", lambda: [capture_model(model, (x,)).graph.fingerprint]
    yield "export", lambda: [capture_exported(torch.export.export(model, (x,))).graph.fingerprint]
    yield "compile", lambda: compiled(True)
    yield "compile, no_grad", lambda: compiled(False)


def survey(spec: str, path: Path) -> None:
    """Capture one network, and add its line to the file."""
    warnings.simplefilter("ignore")
    line: dict[str, Any] = {"network": spec, "failed": {}, "fingerprints": {}}
    try:
        model, x = build(spec)
        with torch.no_grad():
            model(x)  # some keep tensors from their first call on
    except Exception as error:  # a library's own: it is not there, or takes other inputs
        line["failed"]["build"] = f"{type(error).__name__}: {str(error)[:200]}"
    else:
        for way, capture in captures(model, x):
            try:
                line["fingerprints"][way] = [one[:12] for one in capture()]
            except (GetfuseError, RuntimeError, TypeError, ValueError) as error:
                line["failed"][way] = f"{type(error).__name__}: {str(error)[:200]}"
    found = {tuple(own) for own in line["fingerprints"].values()}
    line["equal"] = len(found) == 1 if len(line["fingerprints"]) > 1 else None
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="the results, one line per network")
    parser.add_argument("names", nargs="*", help="networks (all)")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds per network (180)")
    given = parser.parse_args()
    names = given.names or networks()
    known = given.path.read_text().splitlines() if given.path.exists() else []
    done = {json.loads(line)["network"] for line in known}
    for spec in names:
        if spec in done:
            continue
        process = multiprocessing.get_context("fork").Process(
            target=survey, args=(spec, given.path)
        )
        process.start()
        process.join(given.limit)
        if process.is_alive():
            process.kill()
            process.join()
            with given.path.open("a") as file:
                late = {"network": spec, "failed": {"time": given.limit}, "equal": None}
                file.write(json.dumps(late) + "\n")
    lines = [json.loads(line) for line in given.path.read_text().splitlines()]
    compared = [line for line in lines if line["equal"] is not None]
    differ = [line["network"] for line in compared if not line["equal"]]
    print(f"{len(compared) - len(differ)} of {len(compared)} networks have one fingerprint")
    print(f"not captured in two ways: {len(lines) - len(compared)}")
    print("\n".join(["differ:", *differ]) if differ else "none differs")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
