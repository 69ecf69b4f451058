"""The commands: each parses, opens, calls one tool and writes. No module here imports torch at its top level."""

from importlib.metadata import version

__version__ = version("rbkit")
