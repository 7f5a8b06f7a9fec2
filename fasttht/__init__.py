"""High-throughput trainer for Two Head Adversarial Training (THAT, arXiv 2103.13612)."""

__version__ = "0.1.0"
