"""The tasks: each says what its data, its metrics and its report are."""
