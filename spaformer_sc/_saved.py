"""The format of saved models: a folder with ``model.json`` and ``weights.safetensors``. Nothing in it is executed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._files import replacing

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 5
"""Version of the format."""

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
    from safetensors.torch import save_file

    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; pass overwrite=True to replace it.")
    if target.exists() and not (target / _DESCRIPTION).is_file():
        raise FileExistsError(f"{target} is not a saved model, so it is not replaced; choose another path.")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as folder:
        folder.mkdir()
        text = json.dumps({"format": "spaformer_sc", "schema": SCHEMA, **description}, indent=1)
        (folder / _DESCRIPTION).write_text(text, encoding="utf-8")
        save_file(weights, folder / _WEIGHTS)


def read_model(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read description and weights of a model.

    Raises
    ------
    FileNotFoundError
        If there is no saved model at ``path``.
    ValueError
        If it is not a saved model, is damaged, or was written in another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

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
        return description, load_file(folder / _WEIGHTS)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged or not a saved model: {error}") from error
