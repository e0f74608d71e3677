"""Training: configuration, methods, the loop, and the folder that a run leaves."""
