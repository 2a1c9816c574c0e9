"""What a user is told: bad inputs, switches and files as exceptions with a sentence to act on."""

from __future__ import annotations


class UserError(Exception):
    """A bad input, switch or file. Its text is one sentence that names it and says what to do."""
