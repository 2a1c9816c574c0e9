"""Answers: the decoding alone, prompts and programs, a benchmark's samples, one prompt in the terminal."""
