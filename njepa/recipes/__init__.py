"""Recipes: complete YAML configurations and their DeepSpeed files; ``njepa.config`` reads them."""
