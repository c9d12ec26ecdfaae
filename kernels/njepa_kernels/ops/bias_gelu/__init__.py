"""bias_gelu: what stands between the two products of a transformer block's MLP."""
