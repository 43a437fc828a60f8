"""The version of this package, also written into exported files."""

__version__ = "0.1.0"
