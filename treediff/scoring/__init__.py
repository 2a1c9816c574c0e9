"""A program judged: verdicts, ledgers, intervals and tests."""
