"""What all plots share: colours, a new figure, a legend that covers nothing, and a file that is written atomically."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayeslayers.checks import did_you_mean
from bayeslayers.display import printable
from bayeslayers.files import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008, Color Universal Design. The yellow is too light for lines: it comes last.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, YELLOW, GREY = "#CC79A7", "#56B4E9", "#000000", "#F0E442", "#999999"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, YELLOW)
# Each of these is as far as possible in CIELAB from those before it, with normal vision and without red or green cones
# (Machado et al. 2009): the distance is at least 20.
_MORE = """#0000FF #000066 #99FF99 #333300 #6666FF #663366 #000033 #666633 #6699FF #333333 #000099 #FF3366""".split()
LINES = ("-", "--", ":", "-.")
UNCERTAINTY = "cividis"  # perceptually uniform, and almost the same with colour blindness


def palette(count: int) -> list[str]:
    """Return distinguishable colours for `count` classes; more than 20 get the hues of a rainbow."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colours = [*COLOURS, *_MORE]
    if count <= len(colours):
        return colours[:count]
    return [to_hex(colormaps["turbo"](k / (count - 1))) for k in range(count)]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, with constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def finish(figure: Figure, path: str | Path | None) -> Figure:
    """Write the figure if there is a path, and return it."""
    if path is not None:
        path = Path(path)
        known, kind = figure.canvas.get_supported_filetypes(), path.suffix.lower().removeprefix(".")
        if kind not in known:
            raise ValueError(f"path must end in .png, .svg or .pdf, got {path}.{did_you_mean(kind, known)}")
        write_atomically(path, rendered(figure, kind))
    return figure


def rendered(figure: Figure, kind: str = "png", dpi: int = 110) -> bytes:
    """Return the content of the figure's file."""
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=dpi)
    return stream.getvalue()


def label(axis: Axes, title: str, x: str, y: str) -> None:
    """Set a panel's title and axis labels, and remove the upper and right spines."""
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, handles: Sequence[Any], title: str | None = None) -> None:
    """Put one legend below all panels, in as many columns as fit the figure."""
    widest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (0.085 * widest + 0.65))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False, title=title)


def short(name: str, width: int = 28) -> str:
    """Return a name for a legend: shortened in the middle to `width`, with dollar signs escaped."""
    line = " ".join(printable(name).split())
    if len(line) > width:
        line = f"{line[: width // 2]}…{line[len(line) - (width - 1) // 2 :]}"
    return f"{' ' * line.startswith('_')}{line}".replace("$", r"\$")  # matplotlib hides labels that begin with "_"


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor's values for matplotlib."""
    return tensor.detach().cpu().double().numpy()
