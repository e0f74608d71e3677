"""Experiments on top of the library and the zoo, and the command line that runs them."""
