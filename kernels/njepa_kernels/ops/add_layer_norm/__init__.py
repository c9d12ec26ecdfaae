"""add_layer_norm: the residual add of a transformer block and the LayerNorm behind it."""
