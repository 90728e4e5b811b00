"""Train and evaluate residual networks and recurrent sequence-to-sequence models from the command line."""

__version__ = "0.1.0"
