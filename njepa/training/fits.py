"""Refuses a network that this machine could not hold, before anything of it is made."""

from __future__ import annotations

from njepa import planning
from njepa.config import Config, ConfigError
from njepa.config.deepspeed_file import DeepSpeedFile
from njepa.runs.ranks import Ranks
from njepa.runs.room import all_memory

#: What a rank holds for certain; DeepSpeed makes buckets no larger than the network.
_HELD = ("parameters", "gradients", "master", "optimizer", "target")


def check_memory(config: Config, ds: DeepSpeedFile, ranks: Ranks) -> None:
    """Compare weights, gradients and moments with all the memory there is. Collective.

    A network that passes may still not fit with its activations: ``--dry-run`` and ``njepa plan``
    predict that.

    Raises:
        ConfigError: they alone are larger.
    """
    device = ranks.device.type
    held = planning.state_bytes(
        planning.network(config), planning.zero_settings(ds, device), ranks.world
    )
    needed, there = sum(held[name] for name in _HELD), all_memory(ranks)
    if needed > there:
        place = "the GPU" if ranks.on_gpu else "the share of the host's memory"
        raise ConfigError(
            f"weights, gradients, AdamW's moments and target encoder need {needed / 1e9:,.1f} GB "
            f"a rank ({ranks.world} in all), but {place} is {there / 1e9:,.1f} GB; take a smaller "
            f"model.encoder, or more ranks and ZeRO stage 3 (njepa plan)"
        )
