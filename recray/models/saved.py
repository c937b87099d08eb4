"""Models on disk: `model.safetensors` holds the state_dict, the manifest the recipe and catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recray import config
from recray.errors import ArtefactError, ConfigError
from recray.manifest import Artefact
from recray.models import build_model
from recray.models.base import Catalogue, Model

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

WEIGHTS = "model.safetensors"


def save_model(folder: Path, model: Model) -> None:
    """Write the model's whole state into `folder`, which exists."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)


def options_of(model: Model) -> dict[str, Any]:
    """The model's options, every default resolved: what a manifest's recipe keeps of it."""
    return config.as_dict(model.config)


def catalogue_report(catalogue: Catalogue) -> dict[str, Any]:
    """What a manifest's report keeps of the catalogue; `catalogue_of` reads it back."""
    return {
        "n_items": catalogue.n_items,
        "context": dict(catalogue.context),
        "item_values": dict(catalogue.item_values),
        "item_numbers": catalogue.item_numbers,
    }


def catalogue_of(artefact: Artefact) -> Catalogue:
    """The catalogue a checkpoint was trained for; ArtefactError if the manifest does not say."""
    entry: Any = artefact.manifest.report.get("catalogue")
    try:
        context = {str(name): int(size) for name, size in entry["context"].items()}
        values = {str(name): int(size) for name, size in entry.get("item_values", {}).items()}
        return Catalogue(int(entry["n_items"]), context, values, int(entry.get("item_numbers", 0)))
    except (TypeError, KeyError, ValueError, AttributeError):
        raise ArtefactError("does not say which catalogue it was trained for", where=artefact.place) from None


def check_items(checkpoint: Artefact, dataset: Dataset) -> None:
    """Raise ConfigError where the rows of a checkpoint are not the items of the dataset."""
    n, known = catalogue_of(checkpoint).n_items, checkpoint.manifest.report.get("item_ids")
    words = ""
    if n != dataset.n_items:
        words = f"knows {n} items and the dataset has {dataset.n_items}"
    elif known is not None and known != dataset.items.digest():
        words = "knows other items than the dataset, or in another order"
    if words:
        raise ConfigError(words, where=checkpoint.place, fix="give the dataset it was trained on")


def load_model(artefact: Artefact) -> Model:
    """The model of a checkpoint, in eval mode. Raises ArtefactError where state and recipe disagree."""
    recipe = artefact.manifest.recipe
    try:
        model = build_model(recipe["model"], catalogue_of(artefact), recipe.get("options", {}))
    except KeyError:
        raise ArtefactError("its manifest names no model", where=artefact.place) from None
    except ConfigError as error:
        raise ArtefactError(f"its recipe does not fit this version ({error})", where=artefact.place) from None
    artefact.file(WEIGHTS)
    with artefact.local() as folder:
        try:
            state = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{WEIGHTS} cannot be read ({error})", where=artefact.place) from None
    load_state(model, state, where=artefact.place)
    return model.eval()


def load_state(model: Model, state: Mapping[str, Tensor], *, where: object) -> None:
    """Put a state into a model; every name, shape and type must be the model's own."""
    want = model.state_dict()
    if set(want) != set(state):
        missing, extra = sorted(set(want) - set(state)), sorted(set(state) - set(want))
        raise ArtefactError(f"its weights lack {missing or 'nothing'} and have extra {extra}", where=where)
    for name, tensor in want.items():
        found = state[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise ArtefactError(
                f"{name} is {found.dtype}{list(found.shape)}, not {tensor.dtype}{list(tensor.shape)}",
                where=where,
            )
    model.load_state_dict(dict(state))
