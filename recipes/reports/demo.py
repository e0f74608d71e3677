"""The demonstration: bundled posteriors predict digits, rotated digits and articles of clothing."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import bayeslayers as bl
import zoo
from bayeslayers.checks import at_least_one
from bayeslayers.display import printable
from bayeslayers.plots import predictive_panels
from recipes.training.devices import device_named

ASSETS = Path(__file__).parents[1] / "assets" / "demo.safetensors"
DIGITS = [str(digit) for digit in range(10)]
ARTICLES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def demo(output: Path, num_samples: int = 64, seed: int = 0, device: str | None = None) -> None:
    """Print what each bundled posterior predicts for known and out-of-distribution images, and draw it.

    Args:
        output: PNG file to write, which is written first.
        num_samples: Samples per prediction.
        seed: Of the samples.
        device: Where to compute, as torch names it; None for the CPU.
    """
    at_least_one("num_samples", num_samples)
    where = device_named(device or "cpu")
    groups = demo_images()
    tables = []
    for name in ("lenet5-mnist", "mlp-mnist"):
        model = zoo.load(name).to(where)
        generator = torch.Generator(where).manual_seed(seed)
        predictions = {
            title: bl.predict(model, x, num_samples, generator=generator, result_device="cpu")
            for title, (x, _) in groups.items()
        }
        tables.append(_table(name, groups, predictions, zoo.card_of(model).class_names))
        if name == "lenet5-mnist":
            rows = [(title, groups[title][0], prediction) for title, prediction in predictions.items()]
            targets = [torch.arange(10) if shown == DIGITS else None for _, shown in groups.values()]
            predictive_panels(rows, DIGITS, output, targets)
    console = Console(highlight=False)
    for table in tables:
        console.print(table)
    console.print(
        "Uncertainties are entropies in nats, at most log 10 = 2.30. Aleatoric: the image itself is ambiguous. "
        "Epistemic: the samples of the weights disagree, because the network has seen nothing like the image. "
        "On clothing both are large: a sample by itself hesitates between digits, as it learned to do between two "
        "that look alike, and other samples hesitate between others. A cross marks a wrong digit."
    )
    print(printable(f"Picture: {output}"))


def demo_images() -> dict[str, tuple[Tensor, list[str]]]:
    """Return per group its title, images in [0, 1] and what they show: the first test image of each class."""
    from torchvision.transforms.functional import InterpolationMode, rotate

    images = {name: data.float()[:, None] / 255 for name, data in load_file(ASSETS).items()}
    return {
        "MNIST digits": (images["digits"], DIGITS),
        "The same digits, rotated by 70 degrees": (rotate(images["digits"], 70.0, InterpolationMode.BILINEAR), DIGITS),
        "Fashion-MNIST articles, which are no digits": (images["articles"], list(ARTICLES)),
    }


def _table(
    name: str,
    groups: dict[str, tuple[Tensor, list[str]]],
    predictions: dict[str, bl.Prediction],
    class_names: list[str],
) -> Table:
    table = Table(title=name, title_justify="left")
    for column in ("shown", "predicted"):
        table.add_column(column, overflow="fold")
    for column in ("confidence", "total", "aleatoric", "epistemic"):
        table.add_column(column, justify="right", overflow="fold")
    for title, prediction in predictions.items():
        table.add_section()
        parts = [prediction.confidence, prediction.total, prediction.aleatoric, prediction.epistemic]
        averages = [f"[bold]{float(part.mean()):.3f}[/bold]" for part in parts]
        table.add_row(f"[bold]{title}[/bold]", "[bold]mean[/bold]", *averages)
        for index, shown in enumerate(groups[title][1]):
            label = class_names[int(prediction.labels[index])]
            mark = "" if groups[title][1] != DIGITS or int(prediction.labels[index]) == index else " [red]x[/red]"
            table.add_row(f"  {shown}", f"{label}{mark}", *(f"{float(part[index]):.3f}" for part in parts))
    return table
