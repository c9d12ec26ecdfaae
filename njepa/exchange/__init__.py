"""Weights in and out: other libraries' files read safely, a run's encoder written for them."""
