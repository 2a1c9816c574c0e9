"""Rows become examples, examples an encoded data set; benchmarks, contamination, and the problem set TinyCode."""
