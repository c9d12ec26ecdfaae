"""gather_tokens: x[b, idx] + pos[idx]."""
