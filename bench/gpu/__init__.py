"""What runs on a borrowed machine with a GPU and without a network."""
