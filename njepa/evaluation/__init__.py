"""What frozen features are worth: kNN and linear probe, beside the floors they must beat."""
