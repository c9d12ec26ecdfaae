"""What the ops share: choice of the implementation, registration, checks, launching, noise."""
