"""Printed text, as tests look for sentences in it."""

from __future__ import annotations


def one_line(made: object) -> str:
    """A result's text with single spaces, wherever it wraps."""
    return " ".join(str(made).split())
