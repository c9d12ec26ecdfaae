"""njepa: pre-training of Vision Transformers with joint-embedding prediction."""

__version__ = "0.1.0"
