"""predictor_tokens: context tokens and (noised) queries of the predictor."""
