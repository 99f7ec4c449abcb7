"""What goes wrong in a conversion though the input is right."""

from __future__ import annotations


class ConversionError(RuntimeError):
    """The folder was not made; the message says why."""
