"""A posterior for other runtimes: fixed posterior samples in one program that returns mean and uncertainties."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayeslayers.checks import at_least_one
from bayeslayers.convert import last_layer, to_deterministic
from bayeslayers.inputs import Batch, Inputs, as_batch, leaves, on_tensors, repeated
from bayeslayers.likelihoods import Likelihood, likelihood_of
from bayeslayers.method import DEFAULT_METHOD, method_of
from bayeslayers.outputs import Output, check_output, tensor_output
from bayeslayers.sampling import Sampler, Site, sites_of
from bayeslayers.unwrap import unwrapped

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.onnx import ONNXProgram

OUTPUTS = ("mean", "total", "aleatoric", "epistemic")
_ONE_FILE_BYTES = 2**31 - 2**20  # protobuf's limit for a file, less room for the graph


class FixedDraws(nn.Module):
    """The posterior predictive over samples that are drawn once: inputs to a tuple of the parts in `OUTPUTS`.

    Its inputs are those of the network, tensors `(n, *)`.

    Each sample is a network of torch.nn layers, in `networks`; they share the tensors without a posterior. Memory
    and file size are `num_samples` times the sampled weights. The predictions are those of `predict` with the method
    "sample". A model whose card names another method, such as a Laplace posterior over several layers, is exported
    with a warning.

    Args:
        model: Model with Bayesian layers, left unchanged.
        num_samples: Posterior samples, >= 1.
        likelihood: Meaning of the outputs; None takes `model.likelihood`, else `Categorical()`.
        generator: Source of the samples, on the model's device; torch's default one if None. `predict` draws
            the same samples from it, so that the outputs agree to rounding.
        output: Which part of what the network returns, as in `predict`.
        keywords: Names under which the network takes the last inputs.

    Raises:
        ValueError: If no layer is Bayesian or `num_samples` < 1.
        TypeError: If a Bayesian layer is of a class without a rule for its torch.nn layer.
    """

    def __init__(
        self,
        model: nn.Module,
        num_samples: int = 16,
        likelihood: Likelihood | None = None,
        generator: torch.Generator | None = None,
        output: Output | None = None,
        keywords: Sequence[str] = (),
    ):
        super().__init__()
        check_output(output)
        self.output, self.keywords = output, tuple(keywords)
        at_least_one("num_samples", num_samples)
        self.likelihood = likelihood or likelihood_of(model)
        model = unwrapped(model)
        sites = sites_of(model)
        _check_method(model, sites)
        sampler = Sampler(sites, generator, frozen=True)
        plain = to_deterministic(model)
        plain.__dict__.pop("card", None)
        drawn = {site.name for site in sites}
        shared = {id(t): t for name, t in [*plain.named_parameters(), *plain.named_buffers()] if name not in drawn}
        self.networks = nn.ModuleList()
        with torch.no_grad():
            for _ in range(num_samples):
                network = copy.deepcopy(plain, dict(shared))
                with sampler.draw():
                    for site in sites:
                        network.get_parameter(site.name).copy_(site.value)
                self.networks.append(network)
        self.eval().requires_grad_(False)

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        positional = len(args) - len(self.keywords)
        args, kwargs = args[:positional], dict(zip(self.keywords, args[positional:], strict=True))
        outputs = (tensor_output(network(*args, **kwargs), self.output) for network in self.networks)
        draws = [self.likelihood.per_draw(output) for output in outputs]
        means, noise = (torch.stack(column) for column in zip(*draws, strict=True))
        mean, aleatoric = means.mean(0), noise.mean(0)
        total, epistemic = self.likelihood.split(mean, (means - mean).square().mean(0), aleatoric)
        return mean, total, aleatoric, epistemic


def _check_method(model: nn.Module, sites: Sequence[Site]) -> None:
    """Warn if the model's method is another than sampling weights, and the two predict differently."""
    method, drawn = method_of(model), {site.name.rpartition(".")[0] for site in sites}
    linear = method == "linearised" and drawn == set(last_layer(dict(model.named_modules())))
    if method != DEFAULT_METHOD and not linear:
        warnings.warn(
            "fixed samples of the weights predict as method='sample' does, but the model's card says "
            f"{method!r}: the exported program gives other numbers. Measure them by bl.evaluate(model, data, "
            "method='sample') first, or export a posterior over the last layer, bl.laplace(..., layers=bl.last_layer).",
            stacklevel=4,
        )


def to_exported(
    model: nn.Module,
    example: Batch | Mapping[str, Any],
    num_samples: int = 16,
    *,
    likelihood: Likelihood | None = None,
    generator: torch.Generator | None = None,
    output: Output | None = None,
) -> ExportedProgram:
    """Return a `torch.export` program of fixed posterior samples, for batches of any size.

    Program and outputs are those of `FixedDraws`, which explains the cost. `torch.export.save`
    writes it; `.module()` runs it.

    Args:
        model: Model with Bayesian layers, left unchanged.
        example: A batch of inputs `(n, *)` such as the program will get, as for `predict`; all sizes but n are
            fixed, and so are values that are no tensors. The program takes keyword arguments by position, in the
            order of the example.
        num_samples: Posterior samples, >= 1.
        likelihood: Meaning of the outputs; None takes `model.likelihood`, else `Categorical()`.
        generator: Source of the samples, on the model's device; torch's default one if None.
        output: As for `FixedDraws`.

    Raises:
        ValueError: If no layer is Bayesian, `num_samples` < 1 or `example` is not a batch.
        TypeError: If a Bayesian layer is of a class without a rule for its torch.nn layer.
    """
    from torch.export import Dim, export  # slow to import

    batch = _example(example)
    draws = FixedDraws(model, num_samples, likelihood, generator, output, list(batch.kwargs))
    n, arguments = Dim("n"), (*batch.args, *batch.kwargs.values())
    shapes = on_tensors(lambda x: {0: n} if x.dim() else None, arguments)
    return export(draws, arguments, dynamic_shapes={"args": shapes})


def _example(example: object) -> Inputs:
    """Return a batch of two examples or more, because torch.export would take a size of 1 for a constant."""
    batch = as_batch(example) if not isinstance(example, list) else None
    alone = isinstance(batch, Tensor)
    if batch is None or (alone and batch.dim() == 0) or len(batch) == 0:
        found = tuple(batch.shape) if alone else type(example).__name__
        raise ValueError(f"example must be a batch of one input or more, got {found}.")
    batch = repeated(batch, 2) if len(batch) == 1 else batch
    return Inputs(batch) if isinstance(batch, Tensor) else batch


def _names(example: object) -> list[str]:
    """Return the names of a program's inputs: "x" for one, else those of keyword arguments, or numbered."""
    batch = _example(example)
    keys = [f"x{index}" for index, _ in enumerate(leaves(batch.args))]
    keys += [key for key, value in batch.kwargs.items() for _ in leaves(value)]
    return ["x"] if len(keys) == 1 and not batch.kwargs else keys


def to_onnx(
    model: nn.Module,
    path: str | Path,
    example: Batch | Mapping[str, Any],
    num_samples: int = 16,
    *,
    likelihood: Likelihood | None = None,
    generator: torch.Generator | None = None,
    output: Output | None = None,
) -> Path:
    """Write an ONNX file of fixed posterior samples, for batches of any size; needs the extra `bayeslayers[onnx]`.

    One input is called "x", several are called x0, x1 or by their keywords. The outputs are those named in `OUTPUTS`,
    whatever the network calls its own tensors.
    Weights beyond 2 GB go into a second file, `PATH.data`. The written file is checked, and loaded by onnxruntime
    if that is installed.

    Args:
        model: Model with Bayesian layers, left unchanged.
        path: File to write.
        example: As for `to_exported`.
        num_samples: Posterior samples, >= 1; the file holds the weights of each.
        likelihood: As for `to_exported`.
        generator: As for `to_exported`.
        output: As for `to_exported`.

    Returns:
        The path.

    Raises:
        ValueError: As for `to_exported`.
        TypeError: As for `to_exported`.
        ImportError: If onnx or onnxscript is not installed.
        RuntimeError: If a runtime cannot load the file, which is then removed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"to_onnx needs onnx and onnxscript, got: {error}. pip install 'bayeslayers[onnx]'."
        ) from None
    exported = to_exported(model, example, num_samples, likelihood=likelihood, generator=generator, output=output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's and its libraries' own deprecations
        program = torch.onnx.export(
            exported, input_names=_names(example), output_names=list(OUTPUTS), dynamo=True, verbose=False
        )
    assert program is not None
    _name_apart(program)
    size = sum(t.numel() * t.element_size() for t in exported.state_dict.values())
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path), external_data=size > _ONE_FILE_BYTES)
    _check_file(path)
    return path


def _name_apart(program: ONNXProgram) -> None:
    """Rename the values inside a program's graph, so that none has the name of an input or an output."""
    from onnxscript import ir

    graph = program.model.graph
    named = {*graph.inputs, *graph.outputs}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs:
            if value.name and value not in named:  # an output that is left out has no name
                value.name = f"internal.{value.name}"
    reserved = {value.name for value in named}
    for value in list(graph.initializers.values()):
        if value.name in reserved and value not in named:
            value.name = f"internal.{value.name}"


def _check_file(path: Path) -> None:
    """Raise if a file is not an ONNX model that onnxruntime loads, after removing it."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
        try:
            import onnxruntime  # pyright: ignore[reportMissingImports]
        except ImportError:
            return
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # each library and release has its own kinds
        for written in (path, path.with_name(f"{path.name}.data")):
            written.unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:300]
        raise RuntimeError(
            f"the ONNX file must be one that a runtime loads, got: {reason} Use bl.to_exported, and report the network."
        ) from error
