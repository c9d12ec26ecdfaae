"""vicreg: invariance, variance, covariance."""
