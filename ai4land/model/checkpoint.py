"""Trained models on disk: safetensors weights with a JSON card; nothing is ever unpickled.

The card describes what a user of the weights needs: legend, channels and their normalisation, grid, network, split and
training. The state that training resumes from is another file, loaded with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import ai4land
from ai4land.errors import DataError, MismatchError
from ai4land.legend import Legend
from ai4land.model.ensemble import Ensemble
from ai4land.model.features import FeatureSpec
from ai4land.model.unet import UNet

WEIGHTS = "model.safetensors"
CARD = "model.json"


class Card(BaseModel):
    """Description of a model.

    Attributes
    ----------
    network
        Arguments of :class:`ai4land.model.unet.UNet`, the same for every member.
    members, sharpness
        Of the :class:`ai4land.model.ensemble.Ensemble`.
    bfloat16
        Result of :func:`ai4land.train.validation.gate`: whether the network may run in bfloat16.
    cell
        Width and height of a fine cell in the units of the grid.
    weights, split, store
        SHA-256 checksum of the weights file, fingerprint of the split, and identity of the store it was trained on.
    training
        Steps, best step and validation loss of each member, members whose validation loss never improved (their weights are
        untrained), class weights, training years.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    version: str = ai4land.__version__
    legend: Legend
    spec: FeatureSpec
    network: dict[str, Any]
    members: int = Field(default=1, ge=1)
    sharpness: float = 1.0
    bfloat16: dict[str, float] = {}
    cell: tuple[float, float]
    weights: str
    split: str
    store: str
    training: dict[str, Any]


def save_model(folder: Path, members: list[dict[str, torch.Tensor]], card: Card) -> Card:
    """Write the weights of all members and the card; return the card with their number and checksum filled in."""
    from ai4land.places import write_atomically  # here: it loads Zarr, which a user of the weights need not have

    named = {f"{i}.{name}": value for i, weights in enumerate(members) for name, value in weights.items()}
    data = save({name: value.detach().cpu().contiguous() for name, value in sorted(named.items())})
    card = card.model_copy(update={"weights": hashlib.sha256(data).hexdigest(), "members": len(members)})
    write_atomically(folder / WEIGHTS, data)
    write_atomically(folder / CARD, (json.dumps(card.model_dump(mode="json"), indent=1) + "\n").encode())
    return card


def load_card(folder: Path) -> Card:
    """Read the card of a model.

    Raises DataError if the folder holds no model, or its card is not valid.
    """
    path = folder / CARD
    if not path.is_file():
        raise DataError(f"no model in {folder} ({CARD} is missing); train one first: ai4land train RUN.yaml")
    try:
        return Card.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"model card {path} is not valid: {error}; delete it and train again") from error


def load_model(folder: Path) -> tuple[Ensemble, Card]:
    """Load a model for inference, in evaluation mode.

    Raises DataError if the card or the weights are missing or the card is not valid, and MismatchError if the weights do not
    match the card.
    """
    card = load_card(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise DataError(f"no weights at {path}; train the model again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != card.weights:
        raise MismatchError(
            f"weights {path} do not have the checksum of {CARD}; the files are of two trainings, or damaged: train again"
        )
    try:
        model = Ensemble((UNet(**card.network) for _ in range(card.members)), sharpness=card.sharpness)
        model.members.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise MismatchError(f"weights {path} do not fit the network of {CARD}: {error}") from error
    return model.eval(), card


def check_fits(card: Card, *, legend: Legend, feature_names: list[str], states: list[str], factor: int) -> None:
    """Raise MismatchError, naming the difference, if a model's legend, channels or nesting do not match the store."""
    pairs = (
        ("legend", (card.legend.name, card.legend.codes.tolist()), (legend.name, legend.codes.tolist())),
        ("static maps", [f.name for f in card.spec.features], feature_names),
        ("coarse states", list(card.spec.states), states),
        ("fine cells in a coarse cell", card.network["factor"], factor),
    )
    for what, has, wants in pairs:
        if has != wants:
            raise MismatchError(
                f"checkpoint has {what} {has}, expected {wants} as in the store; train a model for this store, or align the store it was trained on"
            )


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state that training resumes from."""
    from ai4land.places import write_atomically  # here: it loads Zarr

    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """Read the state that training resumes from; raise DataError if it holds more than tensors and plain values."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"training state {path} cannot be read ({type(error).__name__}), expected tensors and plain values as training saves them; "
            "delete it to start the training anew"
        ) from error
    return state
