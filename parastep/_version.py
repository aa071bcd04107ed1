"""The version of the package; pyproject.toml, setup.py and the Makefile read it from here."""

__version__ = "0.1.0"
