"""adamw_ema_: AdamW, the average that follows the weights and bf16 copies of both, in one pass."""
