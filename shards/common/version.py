"""The version of the project. `maskstream.__version__` and every `--version` show it, also in a checkout."""

__version__ = "0.1.0"
