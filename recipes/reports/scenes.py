"""Pictures of segmentations: panels of uncertainty, masks in colour, and what a report shows of them."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import bayeslayers as bl
from bayeslayers.plots import accuracy_by_confidence, segmentation_panels
from recipes.data.segmentation_files import IGNORED, Scenes
from recipes.data.segmentation_sets import CAMVID_CLASSES, CITYSCAPES_CLASSES
from recipes.reports.measure import EvaluationRequest, Picture, Section, method_options

_SHOWN, _DRAWS = 4, 16  # pictures of a report's panels, and posterior samples behind them
# The colours in which both sets are handed out.
_CAMVID = "808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0"
_CITYSCAPES = (
    "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64 "
    "005064 0000e6 770b20"
)
_PALETTES: dict[tuple[str, ...], list[str]] = {
    names: [f"#{colour}" for colour in colours.split()]
    for names, colours in ((CAMVID_CLASSES, _CAMVID), (CITYSCAPES_CLASSES, _CITYSCAPES))
}


def colours_of(class_names: Sequence[str]) -> list[str]:
    """Return a colour per class: those of CamVid and Cityscapes for their classes, else distinguishable ones."""
    from bayeslayers.plots.canvas import palette

    return _PALETTES.get(tuple(class_names)) or palette(len(class_names))


def mask_png(labels: Tensor, class_names: Sequence[str]) -> bytes:
    """Return class indices `(h, w)` as a PNG with a palette: its values are the indices, its colours the classes'.

    Args:
        labels: Classes, < 256, on any device.
        class_names: Names of the classes.
    """
    from PIL import Image
    from PIL.ImageColor import getrgb

    image = Image.fromarray(labels.to(torch.uint8).cpu().numpy())
    image.putpalette([part for colour in colours_of(class_names) for part in getrgb(colour)[:3]])  # makes its mode "P"
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def scene_sections(
    model: nn.Module, request: EvaluationRequest, data: Scenes, evaluation: bl.Evaluation
) -> list[Section]:
    """Return what a report shows of a segmentation: some pictures with their uncertainty, and the classes.

    Args:
        model: Network as it is measured.
        request: How it was measured.
        data: Pictures of the test split.
        evaluation: What was measured.
    """
    names = data.classes
    text = "Uncertainty should be high where the prediction is wrong. Entropy is all of it; the mutual information of "
    text += "label and weights is the part that more training data would remove."
    panels = segmentation_panels(
        *_some_predicted(model, request, data), class_names=names, palette=colours_of(names), ignore_index=IGNORED
    )
    assert evaluation.class_iou is not None
    iou = ", ".join(f"{name} {value:.1%}" for name, value in zip(names, evaluation.class_iou.tolist(), strict=True))
    kept = "Keep the pixels that are predicted with a confidence above a threshold, and more of them are right."
    return [
        Section("Some pictures", text, [Picture(panels, "Panels of uncertainty")], layout="wide"),
        Section(
            "Classes",
            f"Intersection over union: {iou}.",
            [Picture(accuracy_by_confidence(evaluation), "Accuracy against confidence", [[kept]])],
        ),
    ]


def _some_predicted(model: nn.Module, request: EvaluationRequest, data: Scenes) -> tuple[Tensor, Tensor, bl.Prediction]:
    """Return some pictures at equal distances with their labels and their prediction, of the size of the first."""
    device, count = next(model.parameters()).device, min(_SHOWN, len(data))
    generator = torch.Generator(device).manual_seed(request.seed)
    chosen = data.of_one_size(torch.arange(count) * len(data) // count)
    x = chosen.inputs(slice(None))
    prediction = bl.predict(
        model,
        x.to(device),
        min(request.num_samples, _DRAWS),
        generator=generator,
        batch_size=1,
        result_device="cpu",
        **method_options(request),
    )
    return x, chosen.targets[:], prediction
