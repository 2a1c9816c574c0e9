"""A program held: its values, its isolation, the processes around it. Never a verdict."""
