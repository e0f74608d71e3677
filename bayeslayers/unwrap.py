"""The network inside torch's wrappers: data parallelism, averages of weights, compilation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from bayeslayers.checks import network


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside torch's wrappers, at any depth.

    The wrappers are `DataParallel`, `DistributedDataParallel`, `AveragedModel` and the result of `torch.compile`.
    The network computes the same outputs, and its tensors have the names that a saved posterior uses.
    """
    *_, inner = unwrapping(model)
    return inner


def unwrapping(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model, the module that it wraps, and so on down to the network.

    Raises:
        TypeError: If the model is no module.
    """
    network("model", model)
    wrapped: nn.Module | None = model
    while wrapped is not None:
        yield wrapped
        wrapped = _inside(wrapped)


def compiled_or_unwrapped(model: nn.Module) -> nn.Module:
    """Return the network without its wrappers, but compiled if the innermost wrapper is `torch.compile`.

    `DataParallel` runs its replicas in threads, and `DistributedDataParallel` waits for other ranks. A prediction
    belongs to its thread and may run on one rank, so it can use neither.
    """
    *_, outer, inner = (None, *unwrapping(model))
    return inner if outer is None or not _is_compiled(outer) else outer


def holds_compiled(model: nn.Module) -> bool:
    """Whether a module of the model is compiled, wrapped or in place: a hook on it would be compiled too."""
    return any(_is_compiled(module) or module._compiled_call_impl is not None for module in model.modules())


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
        return model.module
    return model._modules["_orig_mod"] if _is_compiled(model) else None


def _is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` returned the module. An attribute tells, because the class is slow to import."""
    return isinstance(model, nn.Module) and "_orig_mod" in model._modules
