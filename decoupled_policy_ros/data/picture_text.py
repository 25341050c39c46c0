"""Names in pictures, as they are."""

from __future__ import annotations


def literal(text: str) -> str:
    """A name that Matplotlib draws as it is: it takes what is between two dollar signs for a formula, or refuses it."""
    return text.replace('$', r'\$')
