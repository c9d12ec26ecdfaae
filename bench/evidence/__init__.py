"""The ablations of the papers, small: ``python -m bench.evidence list``."""
