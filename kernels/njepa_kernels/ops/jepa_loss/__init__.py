"""jepa_loss: smooth-L1 to the LayerNorm of the gathered targets."""
