"""Fine-tuning: the whole encoder with a linear head on labelled images, by MAE's recipe in timm.

AdamW, base learning rate 5e-4 x batch / 256, layer decay 0.65, weight decay 0.05, 5 epochs of
warm-up and a cosine, stochastic depth 0.1, RandAugment 9/0.5, random erasing 0.25, mixup 0.8,
cutmix 1.0, label smoothing 0.1, head on the mean of the tokens (arXiv 2111.06377, appendix A.2, and
the commands of its repository for ViT-B). Nothing is chosen: the last epoch is tested, once.

timm builds the network from our weights (the parameter names are the same) and brings every piece
of the recipe, so that a fine-tuned number means what it means elsewhere.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from njepa.config import ConfigError
from njepa.data.decode import decode
from njepa.data.errors import DecodeError
from njepa.evaluation.accuracy import Accuracy, wilson
from njepa.evaluation.images import stream
from njepa.evaluation.subject import Subject
from njepa.evaluation.task import Side

LAYER_DECAY, WEIGHT_DECAY, BASE_LR, WARMUP, DROP_PATH = 0.65, 0.05, 5e-4, 5, 0.1
MIXUP, CUTMIX, SMOOTHING = 0.8, 1.0, 0.1
AUGMENTATION, ERASING = "rand-m9-mstd0.5-inc1", 0.25


class _Augmented(Dataset[tuple[Tensor, int]]):
    def __init__(self, side: Side, transform: Callable[[Image.Image], Tensor]) -> None:
        self._side, self._transform = side, transform

    def __len__(self) -> int:
        return len(self._side.ids)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        try:
            pixels = decode(self._side.index.read(int(self._side.ids[i]))).permute(1, 2, 0).numpy()
        except (OSError, DecodeError) as error:
            name = self._side.index.name(int(self._side.ids[i]))
            raise ConfigError(
                f"{name} cannot be decoded ({error}); `njepa scan` lists a source's good images"
            ) from None
        return self._transform(Image.fromarray(pixels)), int(self._side.labels[i])


def require_timm() -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import timm
        import timm.data
        import timm.loss
        import timm.optim
        import timm.scheduler
    except ImportError as error:
        raise ConfigError(
            f"--kind finetune takes its recipe from timm, which cannot be imported ({error}); "
            f"install it with: pip install 'njepa[finetune]', or 'timm>=1.0.20' alone"
        ) from None
    return timm


def finetune(
    subject: Subject,
    train: Side,
    test: Side,
    classes: int,
    epochs: int,
    batch_size: int,
    device: str,
    seed: int = 0,
    workers: int | None = None,
) -> Accuracy:
    """Top-1 accuracy after ``epochs`` epochs.

    Args:
        workers: processes that read images; 0: this one. None: as many as cores, at most 16.

    Raises:
        ConfigError: timm is missing, fewer images than a batch, or one that cannot be decoded.
    """
    timm = require_timm()
    if len(train.ids) < batch_size:
        raise ConfigError(
            f"fine-tuning with batches of {batch_size} needs as many training images, got "
            f"{len(train.ids)}; use --batch-size with at most {len(train.ids) // 2 * 2}"
        )
    batch_size -= batch_size % 2  # timm's mixup pairs the images of a batch
    with _seeded(seed):
        model = _network(timm, subject, classes).to(device)
        loader = _loader(timm, subject, train, batch_size, seed, workers)
        mixup = timm.data.Mixup(MIXUP, CUTMIX, label_smoothing=SMOOTHING, num_classes=classes)
        solver = timm.optim.create_optimizer_v2(
            model,
            "adamw",
            lr=BASE_LR * batch_size / 256,
            weight_decay=WEIGHT_DECAY,
            layer_decay=LAYER_DECAY,
        )
        steps = len(loader)
        schedule = timm.scheduler.CosineLRScheduler(
            solver,
            t_initial=epochs * steps,
            warmup_t=min(WARMUP, epochs // 2) * steps,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        loss_of = timm.loss.SoftTargetCrossEntropy()
        model.train()
        for step in range(epochs * steps):
            if step % steps == 0:
                batches = iter(loader)
            images, labels = mixup(*(part.to(device) for part in next(batches)))
            schedule.step_update(step)
            solver.zero_grad()
            loss_of(model(images), labels).backward()
            solver.step()
    return _tested(model, subject, test, batch_size, device)


def _network(timm: Any, subject: Subject, classes: int) -> nn.Module:
    weights = subject.weights
    model: nn.Module = timm.models.VisionTransformer(
        img_size=weights.image_size,
        patch_size=weights.patch_size,
        num_classes=classes,
        global_pool="avg",
        embed_dim=weights.width,
        depth=weights.depth,
        num_heads=weights.heads,
        mlp_ratio=weights.hidden / weights.width,
        class_token=False,
        fc_norm=False,
        drop_path_rate=DROP_PATH,
    )
    missing, unexpected = model.load_state_dict(subject.encoder.state_dict(), strict=False)
    assert set(missing) == {"head.weight", "head.bias"}, missing
    assert not unexpected, unexpected
    return model


def _loader(
    timm: Any, subject: Subject, train: Side, batch_size: int, seed: int, workers: int | None
) -> DataLoader[tuple[Tensor, int]]:
    transform = timm.data.create_transform(
        subject.image_size,
        is_training=True,
        auto_augment=AUGMENTATION,
        interpolation="bicubic",
        mean=subject.weights.mean,
        std=subject.weights.std,
        re_prob=ERASING,
        re_mode="pixel",
    )
    for step in transform.transforms:  # Pillow refuses what a drawn magnitude of 10 asks posterize
        for operation in getattr(step, "ops", ()):
            operation.magnitude_max = 9.99
    return DataLoader(
        _Augmented(train, transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=min(16, len(os.sched_getaffinity(0))) if workers is None else workers,
        generator=torch.Generator().manual_seed(seed),
    )


@torch.no_grad()
def _tested(
    model: nn.Module, subject: Subject, test: Side, batch_size: int, device: str
) -> Accuracy:
    mean, std = (
        torch.tensor(v, device=device)[:, None, None]
        for v in (subject.weights.mean, subject.weights.std)
    )
    model.eval()
    answers = []
    for images in stream(test.index, test.ids, subject.image_size, batch_size):
        x = (images.to(device).float() / 255 - mean) / std
        answers.append(model(x).argmax(1).cpu())
    return wilson(int((torch.cat(answers) == test.labels).sum()), len(test.labels))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """timm draws from the global generators: seeded here, and restored."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
