"""The networks of the zoo, one family per file; importing them registers their builders."""

from zoo.networks import alexnet, cifarnet, efficientnet, lenet, mlp, regression, resnet, segmentation, text, vgg

__all__ = ["alexnet", "cifarnet", "efficientnet", "lenet", "mlp", "regression", "resnet", "segmentation", "text", "vgg"]
