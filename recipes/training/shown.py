"""What a run shows while it trains: a progress bar with metrics, and events for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_COLUMNS = (
    TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
)


class ProgressBar(Progress):
    """A progress bar with its metrics on a line below, where 80 columns hold them.

    Args:
        shown: Whether it is, which the ranks beside the first are not.
    """

    def __init__(self, shown: bool = True):
        super().__init__(*_COLUMNS, console=Console(stderr=True), disable=not shown)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["metrics"])


@contextmanager
def events(folder: Path | None, first_epoch: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield a function that writes an epoch's row of the log as events for TensorBoard.

    Args:
        folder: Where they go; None to write none.
        first_epoch: The first that is written. Of a resumed run the last epoch's events come again.
    """
    if folder is None:
        yield lambda _: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)

    def write(row: Mapping[str, float]) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, int(row["epoch"]))

    try:
        yield write
    finally:
        writer.close()


def in_words(metrics: Mapping[str, float]) -> str:
    """Return metrics as a line, without what is said elsewhere.

    >>> in_words({"epoch": 1.0, "seconds": 2.0, "lr": 0.001, "train_loss": 0.5, "test_ece": 0.01})
    'lr 0.001  train loss 0.5000  test ece 0.0100'
    """
    shown = {key: value for key, value in metrics.items() if key not in ("epoch", "seconds")}
    return "  ".join(f"{key.replace('_', ' ')} {value:{_form(key)}}" for key, value in shown.items())


def _form(key: str) -> str:
    return ".2g" if key.endswith(("lr", "temperature")) else ".4f"
