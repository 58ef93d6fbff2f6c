"""Describe the trained model as a STAC item of the MLM extension: inputs, outputs, size and weights.

Everything comes from the model card and the header of the weights; no model is loaded or run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ai4land.cube.describe import Flag, Map
from ai4land.errors import DataError, MismatchError
from ai4land.model.checkpoint import CARD, WEIGHTS, Card
from ai4land.model.features import Feature
from ai4land.publish import stac
from ai4land.publish.credits import Credit

MLM = "https://stac-extensions.github.io/mlm/v1.5.0/schema.json"
TASKS = ["semantic-segmentation", "downscaling"]
_NOT_LEARNT = ("running_mean", "running_var", "num_batches_tracked")


def model_item(folder: Path, card: Card, m: Map, *, title: str, collection: str, to_folder: str) -> dict[str, Any]:
    """Make the item of a model.

    Parameters
    ----------
    m
        A cube that the model made; it supplies the bounding box, time stamps and, by default, years of the item.
    collection
        Id of the collection of the model.
    to_folder
        Href from the item to ``folder``, which holds the card and the weights.

    Raises
    ------
    DataError
        If the weights are missing or not safetensors.
    MismatchError
        If the weights do not match the card.
    """
    weights, header = _weights(folder / WEIGHTS, card.weights)
    years, stamps = sorted(int(y) for y in card.training.get("years", m.years)), m.stamps
    id, bands = f"{collection}-{card.weights[:12]}", _bands(card)
    return {
        "type": "Feature",
        "stac_version": stac.STAC_VERSION,
        "stac_extensions": [MLM, stac.VERSION],
        "id": id,
        "collection": collection,
        "geometry": stac.outline(m.bbox),
        "bbox": list(m.bbox),
        "properties": {
            "title": f"{title}: model",
            "description": "U-Net that maps land cover from the states of a coarse land-use scenario, static maps and a reference map. "
            "Times are those of the maps that it was trained on.",
            "datetime": None,
            "start_datetime": stac.year_start(years[0]),
            "end_datetime": stac.year_end(years[-1]),
            **({"created": stamps[0], "updated": stamps[-1]} if stamps else {}),
            "version": card.weights[:12],
            "mlm:name": f"ai4land-{card.weights[:12]}",
            "mlm:architecture": "U-Net",
            "mlm:tasks": TASKS,
            "mlm:framework": "PyTorch",
            "mlm:memory_size": weights["file:size"],
            "mlm:total_parameters": _parameters(header),
            "mlm:pretrained": False,
            "mlm:pretrained_source": None,
            "mlm:input": _inputs(card),
            "mlm:output": [_output(card)],
            "mlm:hyperparameters": {
                **card.network,
                "members": card.members,
                "sharpness": card.sharpness,
                **{k: v for k, v in card.training.items() if k in ("steps", "best_step", "validation_loss", "class_weights")},
            },
            "bands": bands,
        },
        "assets": {
            "weights": {
                "href": f"{to_folder}/{WEIGHTS}",
                "type": "application/octet-stream",
                "roles": ["mlm:model", "mlm:weights"],
                "title": "Weights (safetensors)",
                "mlm:artifact_type": "safetensors.torch.save_file",
                # STAC allows bands on an item only if an asset has some; MLM reads them only on the item.
                "bands": [{"name": band["name"]} for band in bands],
                **weights,
            },
            "card": {
                "href": f"{to_folder}/{CARD}",
                "type": "application/json",
                "roles": ["metadata"],
                "title": "Model card: legend, channels, normalisation, network",
                **checksum(folder / CARD),
            },
        },
        "links": [
            stac.link("root", "../../catalog.json"),
            stac.link("parent", "../collection.json"),
            stac.link("collection", "../collection.json"),
        ],
    }


def model_collection(
    m: Map, *, id: str, title: str, credits: Sequence[Credit], licence: str, item: dict[str, Any]
) -> dict[str, Any]:
    """Make the collection of a run's model, with the licences and citations of the inputs."""
    fields, links = stac.credit_fields(credits, licence=licence)
    properties = item["properties"]
    return {
        "type": "Collection",
        "stac_version": stac.STAC_VERSION,
        "stac_extensions": [stac.VERSION, *([stac.SCIENTIFIC] if "sci:publications" in fields else [])],
        "id": id,
        "title": f"{title}: model",
        "description": f"The model that made {stac.plain(title)}.",
        **fields,
        "version": properties["version"],
        "extent": {
            "spatial": {"bbox": [list(m.bbox)]},
            "temporal": {"interval": [[properties["start_datetime"], properties["end_datetime"]]]},
        },
        "links": links,
    }


def checksum(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file as fields of the file extension; the hash is a hexadecimal multihash."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return {"file:size": path.stat().st_size, "file:checksum": f"1220{digest.hexdigest()}"}


def _weights(path: Path, wanted: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check a safetensors file; return its checksum fields and its header."""
    if not path.is_file():
        raise DataError(f"no weights at {path}; train the model again")
    fields = checksum(path)
    if fields["file:checksum"] != f"1220{wanted}":
        raise MismatchError(
            f"weights {path} do not have the checksum of {CARD}; the files are of two trainings, or damaged: train again"
        )
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(file.read(min(length, 1 << 26)))
        except ValueError as error:
            raise DataError(f"weights {path} have no safetensors header ({error}); train the model again") from error
    return fields, header


def _parameters(header: dict[str, Any]) -> int:
    total = 0
    for name, tensor in header.items():
        if name == "__metadata__" or name.rpartition(".")[2] in _NOT_LEARNT:
            continue
        size = 1
        for n in tensor["shape"]:
            size *= int(n)
        total += size
    return total


def _bands(card: Card) -> list[dict[str, Any]]:
    static = [
        {"name": n, "description": f"static map {n.partition('=')[0]}", "data_type": "float16"} for n in card.spec.static_names
    ]
    coarse = [{"name": n, "description": "channel of the coarse cells", "data_type": "float32"} for n in card.spec.coarse_names]
    return static + coarse


def _scaling(feature: Feature) -> list[dict[str, Any]]:
    """Scaling of the channels of a static map; each one-hot channel of a category gets an offset of 0."""
    if feature.codes:
        return [{"type": "offset", "value": 0} for _ in feature.codes]
    return [{"type": "z-score", "mean": feature.mean, "stddev": feature.std}]


def _inputs(card: Card) -> list[dict[str, Any]]:
    prepared = {"format": "python", "expression": "ai4land.model.features:features"}
    spec, grid = card.spec, ["height", "width"]
    return [
        {
            "name": "static",
            "description": "Static maps, standardised; a channel a code where they are categories.",
            "bands": spec.static_names,
            "input": {
                "shape": [-1, len(spec.static_names), -1, -1],
                "dim_order": ["batch", "bands", *grid],
                "data_type": "float16",
            },
            "value_scaling": [s for f in spec.features for s in _scaling(f)],
            "pre_processing_function": prepared,
        },
        {
            "name": "reference",
            "description": "Class index (place in the legend) of the reference map; 255 where it is not known.",
            "bands": [],
            "input": {"shape": [-1, -1, -1], "dim_order": ["batch", *grid], "data_type": "uint8"},
            "pre_processing_function": prepared,
        },
        {
            "name": "coarse",
            "description": "States of the coarse cells in the wanted year and in that of the reference map, and their difference.",
            "bands": spec.coarse_names,
            "input": {
                "shape": [-1, len(spec.coarse_names), -1, -1],
                "dim_order": ["batch", "bands", *grid],
                "data_type": "float32",
            },
            "pre_processing_function": prepared,
        },
        {
            "name": "offset",
            "description": "Row and column of the first fine cell, in fine cells from the corner of the coarse window.",
            "bands": [],
            "input": {"shape": [-1, 2], "dim_order": ["batch", "axis"], "data_type": "int64"},
        },
    ]


def _output(card: Card) -> dict[str, Any]:
    flags = [Flag(c.code, c.name, c.colour) for c in card.legend.classes]
    return {
        "name": "class_logits",
        "description": "Log probability of each class, in the order of classification:classes; their values are the codes of the map.",
        "tasks": TASKS,
        "bands": [],
        "result": {
            "shape": [-1, card.legend.n, -1, -1],
            "dim_order": ["batch", "class", "height", "width"],
            "data_type": "float32",
        },
        "classification:classes": stac.classes(flags),
        "post_processing_function": {"format": "python", "expression": "torch.nn.functional:softmax"},
    }
