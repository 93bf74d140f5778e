"""Trained weights as safetensors files with metadata on what they were trained for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torch_getfuse import plugins
from torch_getfuse.errors import GetfuseError

WEIGHTS = Path(__file__).parent / "weights"


class WeightsError(GetfuseError):
    """Weights are missing, damaged, or made for something else."""


def weights_path(model: str, scheme: str, granularity: str, folder: Path | None = None) -> Path:
    """Path of the weights of ``model`` (``"validity"``, ``"pg"``, ``"rg"``) for a scheme."""
    make = plugins.SCHEMES.load(scheme)
    form = f"{scheme}_{granularity}" if plugins.fact(make, "granularities", ()) else scheme
    return (WEIGHTS if folder is None else folder) / f"{form}_{model}.safetensors"


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """A digest of weights, to identify the model that an explainer was trained for."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_weights(
    path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write weights and metadata atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    tensors = {name: value.detach().contiguous() for name, value in state.items()}
    save_file(tensors, part, metadata=dict(metadata))
    part.chmod(0o644)  # safetensors creates files that only their owner can read
    part.replace(path)


def load_weights(
    path: Path, expected: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Weights and metadata of a file whose metadata contains every entry of ``expected``.

    Raises:
        WeightsError: if the file is missing or damaged, or an entry differs.
    """
    retrain = "train them again: torch-getfuse train"
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise WeightsError(f"no weights at {path}; {retrain}") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"the weights at {path} cannot be read ({error}); {retrain}") from error
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise WeightsError(
                f"the weights at {path} are for {name}={metadata.get(name)!r}, "
                f"not {value!r}; {retrain}"
            )
    return state, metadata
