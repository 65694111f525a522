"""A training run in one file: parameters, the optimiser's state, and the generators' states."""

from __future__ import annotations

import json
import os
from typing import Any

from ..errors import ArgumentError
from . import files
from .optim import AdamW
from .transformer import Transformer


def save_checkpoint(
    path: str | os.PathLike[str], model: Transformer, optimizer: AdamW, extra: Any = None
) -> None:
    """Write a safetensors file that `load_checkpoint` continues from, to the same bits.

    It replaces an older one at once: whoever is stopped in between finds the older one. `extra` is anything
    of JSON types, such as the step and the state of the generator that draws batches.
    """
    arrays = {f"model.{name}": x for name, x in model.state_dict().items()}
    arrays |= {f"optimizer.{name}": x for name, x in optimizer.state_dict().items()}
    metadata = {"config": model.config, "random_state": model.random_state(), "extra": extra}
    files.write(path, arrays, {name: json.dumps(x) for name, x in metadata.items()})


def load_checkpoint(path: str | os.PathLike[str], model: Transformer, optimizer: AdamW) -> Any:
    """Put a model and its optimiser where they were saved; returns `extra`.

    Raises
    ------
    ArgumentError, ShapeError
        The file is damaged or is not one of a model like this.
    """
    arrays, metadata = files.read(path)
    config = files.config_of(path, metadata)
    if "random_state" not in metadata:
        raise ArgumentError(f"path: expected a checkpoint, got {os.fspath(path)}")
    if config != (own := json.loads(json.dumps(model.config))):
        other = sorted(name for name in own.keys() | config.keys() if own.get(name) != config.get(name))
        raise ArgumentError(f"path: expected a checkpoint of this model's config, got another {other}")
    owners: tuple[tuple[Transformer | AdamW, str], ...] = (model, "model."), (optimizer, "optimizer.")
    for owner, prefix in owners:
        state = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
        owner.load_state_dict(state)
    model.set_random_state(json.loads(metadata["random_state"]))
    return json.loads(metadata["extra"])
