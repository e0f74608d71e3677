"""Data sets as tensors: splits, image files, augmentation, and the slices that the project ships."""
