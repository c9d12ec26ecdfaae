"""Everything random: pure functions of (seed, step or epoch, sample id), without state."""
