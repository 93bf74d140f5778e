"""Which public networks the survey has."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_SURVEYED = {
    "detection": "needs torchvision's compiled operators, which the CPU build of torch here lacks",
    "quantization": "has a survey of its own: benchmarks of quantised networks",
}
"""Of torchvision, and why."""

NO_IMAGES = {
    "dinat": "needs the library natten",
    "imagegpt": "reads the numbers of colours, not an image",
    "shieldgemma2": "reads text beside the image",
    "siglip2": "reads patches and their places, not an image",
}
"""Of transformers, and why."""


def torchvision_models() -> Iterator[str]:
    """Names of all models, but for those of :data:`NOT_SURVEYED`."""
    from torch_getfuse.models import import_torchvision

    models = import_torchvision().models
    for name in models.list_models():
        parts = models.get_model_builder(name).__module__.split(".")
        if not set(parts) & set(NOT_SURVEYED):
            yield f"torchvision:{name}"


def timm_models() -> Iterator[str]:
    """The smallest model of each module, by its parameters on the meta device."""
    import torch

    from torch_getfuse.models import import_torchvision

    import_torchvision()
    import timm

    kept = ROOT / "runs" / "survey-timm.json"
    if not kept.exists():
        smallest = {}
        for family in timm.list_modules():
            sizes = {}
            for name in timm.list_models(module=family):
                try:
                    with torch.device("meta"):
                        model = timm.create_model(name)
                except Exception as error:  # some cannot be made on the meta device
                    print(f"timm:{name} is left out of its family's choice: {error}")
                    continue
                sizes[name] = sum(p.numel() for p in model.parameters())
            if sizes:
                smallest[family] = min(sizes, key=lambda name: (sizes[name], name))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(smallest, indent=1), encoding="utf-8")
    found = json.loads(kept.read_text(encoding="utf-8"))
    yield from (f"timm:{name}" for name in dict.fromkeys(found.values()))


def transformers_models() -> Iterator[str]:
    """An image classifier of each model type, but for those of :data:`NO_IMAGES`."""
    from torch_getfuse.models import import_torchvision

    import_torchvision()
    from transformers.models.auto import modeling_auto

    for kind in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        if kind not in NO_IMAGES:
            yield f"transformers:{kind}"


LIBRARIES: Mapping[str, Callable[[], Iterator[str]]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
}


def chosen(patterns: Sequence[str]) -> list[str]:
    """Models in the order of the libraries; ``patterns`` as in file names, or all."""
    wanted = [pattern.partition(":")[0] for pattern in patterns] or ["*"]
    libraries = [name for name in LIBRARIES if any(fnmatch.fnmatch(name, w) for w in wanted)]
    specs = [spec for library in libraries for spec in LIBRARIES[library]()]
    if not patterns:
        return specs
    return [spec for spec in specs if any(fnmatch.fnmatch(spec, p) for p in patterns)]
