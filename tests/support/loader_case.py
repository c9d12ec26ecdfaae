"""A source of images and loaders over it, for the tests of loaders."""

import torch

from njepa.config import parse_config
from njepa.data.loader import build_loader
from njepa.data.sources import open_source
from njepa.draws.masks import MaskSampler
from njepa.draws.order import SampleOrder

CPU = torch.device("cpu")

SIZE = 48

#: Mean absolute difference of an image between the backends, in grey levels of 255, without the
#: outermost ring of pixels. Measured on 10 crops of each of 60 photographs at 24, 48, 64 and
#: 224 px: 0.07 to 0.15 on average, 0.47 at most (a CMYK photograph; 0.21 without CMYK).
TOLERANCE = 0.6


class Case:
    """A source, and loaders over it."""

    def __init__(self, path, tmp_path, **sections):
        sections["data"] = {
            "path": str(path), "image_size": SIZE, "hflip": 0.5, "workers": 1,
            "cache_dir": str(tmp_path / "cache"), **sections.get("data", {}),
        }  # fmt: skip
        self.sections = {
            "method": "njepa", "mask": {"min_keep": 2}, "model": {"patch_size": 8}, **sections,
        }  # fmt: skip
        self.index = open_source(path, tmp_path / "cache", progress=False)

    def loader(self, backend, micro=4, accumulation=1, world=1, rank=0, start=0, stop=4, **data):
        section = {**self.sections["data"], "backend": backend, **data}
        config = parse_config({**self.sections, "data": section})
        self.config = config
        self.order = SampleOrder(self.index.n, micro, accumulation, world, rank, config.run.seed)
        self.masks = MaskSampler(config.mask, config.grid, config.run.seed)
        return build_loader(config, self.index, self.order, self.masks, CPU, start, stop)

    def batches(self, *args, **kwargs):
        loader = self.loader(*args, **kwargs)
        try:
            return list(loader)
        finally:
            loader.close()

    def pixels(self, batch):
        """[B, 3, S, S] in grey levels."""
        return batch.images.permute(0, 3, 1, 2).float()
