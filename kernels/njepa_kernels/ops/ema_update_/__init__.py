"""ema_update_: t <- m t + (1 - m) s for many tensors."""
