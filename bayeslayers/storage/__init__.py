"""Posteriors and training states on disk: safetensors and JSON, written atomically and read as untrusted data."""
