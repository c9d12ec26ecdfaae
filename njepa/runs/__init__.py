"""What surrounds a training: ranks, run folder, checkpoints, signals, and what is written down."""
