"""Typed configuration: ``load_config`` reads a recipe and overrides into a ``Config``."""

from njepa.config.loading import dump_config, load_config, parse_config, recipe_names
from njepa.config.messages import ConfigError, did_you_mean
from njepa.config.schema import Config, Method, free_on_resume
from njepa.config.sections import (
    SIGMA_DATA,
    DataConfig,
    EvalConfig,
    ImplConfig,
    MaskConfig,
    ModelConfig,
    NoiseConfig,
    OptimConfig,
    PredictorConfig,
    Range,
    RunConfig,
    Section,
    VicregConfig,
)

__all__ = [
    "SIGMA_DATA", "Config", "ConfigError", "DataConfig", "EvalConfig", "ImplConfig", "MaskConfig",
    "Method", "ModelConfig", "NoiseConfig", "OptimConfig", "PredictorConfig", "Range", "RunConfig",
    "Section", "VicregConfig", "did_you_mean", "dump_config", "free_on_resume", "load_config",
    "parse_config", "recipe_names",
]  # fmt: skip
