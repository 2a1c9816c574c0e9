"""What a user is told: bad inputs, switches and files as exceptions with a sentence to act on."""

from __future__ import annotations


class UserError(Exception):
    """A bad input, switch or file. Its text is one sentence that names it and says what to do."""


class Preempted(Exception):
    """A run that was asked to stop (SIGTERM) and has: its text says where the same command goes on."""

    EXIT = 75  # the process's exit code: BSD's EX_TEMPFAIL, "try again"
