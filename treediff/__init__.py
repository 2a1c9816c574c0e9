"""treediff: syntax-aware corruption, training, sampling and honest scoring of diffusion models for code."""

__version__ = "0.1.0"
