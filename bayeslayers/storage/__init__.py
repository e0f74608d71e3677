"""Posteriors and training states on disk: safetensors and JSON, written whole or not at all, read with distrust."""
