"""Programs for development: tune, resources, export_hf."""
