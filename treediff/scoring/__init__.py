"""A program scored: verdicts, ledgers, intervals and tests."""
