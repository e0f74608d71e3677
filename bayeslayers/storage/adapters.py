"""The posterior of adapters alone, saved without the network that they adapt, and loaded onto it.

Adapters, such as those of LoRA, are small layers beside the frozen ones of a pretrained network. A file of them holds
every parameter that is trained or uncertain, with its posterior, and nothing of the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bayeslayers.layers import POSTERIOR_SUFFIXES, STRUCTURE
from bayeslayers.sampling import posterior, sites_of
from bayeslayers.storage.card import Card, PosteriorError
from bayeslayers.storage.posterior import checked_tensors, read_posterior, take_card, write_posterior
from bayeslayers.storage.weight_file import WEIGHTS, Weights
from bayeslayers.unwrap import unwrapped


def save_adapters(model: nn.Module, folder: str | Path, base_model: str, **fields: Any) -> Card:
    """Write the posterior of a model's adapters to a folder, as `save_posterior` does that of a whole model.

    Args:
        model: Model with adapters, as `peft.get_peft_model` makes it, whose other parameters are frozen. Its uncertain
            parameters and those that are trained are saved.
        folder: Folder to make or replace.
        base_model: Name of the network that is adapted, such as its repository on the Hub; it goes into the card.
        fields: As for `save_posterior`.

    Returns:
        The card as written.

    Raises:
        ValueError: If all parameters of the model are trained, so that none would be left out, and as for
            `save_posterior`.
        FileExistsError: As there.
    """
    network = unwrapped(model)
    sites_of(network)
    own = _adapter_tensors(network)
    if not any(name not in own for name, _ in network.named_parameters()):
        raise ValueError("model must have frozen parameters beside its adapters, got none. Use bl.save_posterior.")
    return write_posterior(network, folder, own, {"base_model": base_model, **fields})


def load_adapters(folder: str | Path, model: nn.Module) -> Card:
    """Check the posterior of adapters, then load it into a model of the same base model and the same adapters.

    Args:
        folder: Folder that `save_adapters` wrote.
        model: The base model with its adapters; unchanged if anything is wrong. Its adapters may be Bayesian layers,
            for VOGN to train them further, or ordinary ones, which get a posterior beside them.

    Returns:
        The posterior's card. The model gets it as `model.card`.

    Raises:
        PosteriorError: If a tensor of the file is none of the model, or one of the model's trained parameters is not in
            the file, and as for `load_posterior`.
    """
    stored, network = read_posterior(folder), unwrapped(model)
    names, own = stored.weights.shapes.keys(), network.state_dict()
    place = Path(folder) / WEIGHTS
    if missing := sorted({name for name, p in network.named_parameters() if p.requires_grad} - names):
        raise PosteriorError(
            f"{place} must hold every trained parameter of the model, got no '{missing[0]}'. Attach the adapters that "
            "were saved, and freeze the rest."
        )
    rest = {name: tensor for name, tensor in own.items() if name not in names}
    left = {name for name in rest if name.endswith((*POSTERIOR_SUFFIXES, *STRUCTURE))}
    tensors = {name: tensor for name, tensor in rest.items() if name not in left}
    Weights(place, {**tensors, **{name: stored.weights.read(name) for name in names}}).fill(network)
    take_card(network, stored.card)
    return stored.card


def _adapter_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of parameters that are uncertain or trained, with the buffers of their posteriors."""
    own = {site.name for site in posterior(network)} | {n for n, p in network.named_parameters() if p.requires_grad}
    kept = {f"{name}{suffix}" for name in own for suffix in ("", *POSTERIOR_SUFFIXES)}
    kept |= {f"{name.rpartition('.')[0]}.{part}" for name in own for part in STRUCTURE}
    return {name: tensor for name, tensor in checked_tensors(network).items() if name in kept}
