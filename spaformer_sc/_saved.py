"""The format of saved models: a folder with ``model.json`` and ``weights.safetensors``. Nothing in it is executed.

Checksums of both, in ``model.json``, tell of damage. They keep nobody from making a model of his own.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._files import replacing

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 6
"""Version of the format."""

UNREADABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What content of another form than is written here leads to."""

_DESCRIPTION, _WEIGHTS = "model.json", "weights.safetensors"


def write_model(
    path: str | os.PathLike[str], description: dict[str, Any], weights: dict[str, Tensor], *, overwrite: bool
) -> None:
    """Write a model; the folder appears whole or not at all.

    Raises
    ------
    FileExistsError
        If ``path`` exists and ``overwrite`` is False, or is not a saved model.
    """
    from safetensors.torch import save

    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; pass overwrite=True to replace it.")
    if target.exists() and not (target / _DESCRIPTION).is_file():
        raise FileExistsError(f"{target} is not a saved model, so it is not replaced; choose another path.")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as folder:
        folder.mkdir()
        data = save(weights)
        (folder / _WEIGHTS).write_bytes(data)
        content = {"format": "spaformer_sc", "schema": SCHEMA, **description, "weights_sha256": _sha256(data)}
        text = json.dumps({**content, "sha256": _checksum(content)}, indent=1)
        (folder / _DESCRIPTION).write_text(text, encoding="utf-8")


def read_model(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read description and weights of a model.

    Raises
    ------
    FileNotFoundError
        If there is no saved model at ``path``.
    ValueError
        If it is not a saved model, is damaged, or was written in another format.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = Path(path)
    if not (folder / _DESCRIPTION).is_file() or not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no saved model ({_DESCRIPTION} and {_WEIGHTS}).")
    try:
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        if not isinstance(description, dict) or description.get("format") != "spaformer_sc":
            raise ValueError("it does not describe a spaformer_sc model")
        schema, version = description.get("schema"), description.get("version")
        if not isinstance(schema, int) or schema > SCHEMA:
            raise ValueError(f"its format is newer than this version of the package reads ({version} wrote it)")
        if schema < SCHEMA:
            raise ValueError(
                f"its format is older than this version of the package reads ({version} wrote it); fit again"
            )
        if description.pop("sha256", None) != _checksum(description):
            raise ValueError(f"{_DESCRIPTION} is not as it was written")
        data = (folder / _WEIGHTS).read_bytes()
        if description.pop("weights_sha256", None) != _sha256(data):
            raise ValueError(f"{_WEIGHTS} is not as it was written, or belongs to another model")
        weights = load(data)
        for name, tensor in weights.items():
            if tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise ValueError(f"{name} in {_WEIGHTS} must be finite numbers of type float32")
        return description, weights
    except (*UNREADABLE, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged or not a saved model: {error}") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checksum(content: dict[str, Any]) -> str:
    """Checksum of what a JSON object says, however it is laid out."""
    return _sha256(json.dumps(content, sort_keys=True).encode())
