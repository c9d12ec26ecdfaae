"""Probes that follow a training: a linear head and kNN on its stream of features.

They read the target features that every step computes anyway, detached, and keep all they need to
themselves: no gradient reaches the run, nothing random is drawn, nothing is communicated. Labels
are looked up by sample id. One image in ten never trains the head and never enters the bank; only
these are scored, so the numbers are those of images without labels, seen as random crops. They
tell a run that learns from one that does not while it runs; ``njepa probe`` measures.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from njepa.config import Config, ConfigError
from njepa.data.index import ImageIndex

_SHARE = 10  # one sample id in ten is scored


def follow_run(config: Config, index: ImageIndex, device: torch.device) -> OnlineProbe | None:
    """The probe of a run; None without ``eval.online``.

    Raises:
        ConfigError: the training images have no labels.
    """
    if not config.eval.online:
        return None
    if index.labels is None:
        raise ConfigError(
            f"eval.online=true needs labels on the training images, and data.path={index.root} has "
            f"none, or one class only; give a folder of class folders, or unset eval.online"
        )
    labels = torch.from_numpy(index.labels).long()
    k, temperature = config.eval.knn_k, config.eval.knn_temperature
    return OnlineProbe(labels, device, k=k, temperature=temperature)


class OnlineProbe:
    """Call ``add`` with the features of every micro-batch and ``read`` when a line is logged.

    The head is trained on features standardised by running statistics, by SGD with momentum on
    softmax cross-entropy, its gradient written out: x^T (softmax - onehot) / B. The bank of kNN
    holds the last ``bank`` training images, which vote as in ``knn.py``.

    Args:
        labels: int64 [n], class of each sample id.
        device: of the features.
        k, temperature: as ``eval.knn_k`` and ``eval.knn_temperature``.
    """

    def __init__(
        self,
        labels: Tensor,
        device: torch.device | str,
        *,
        bank: int = 4096,
        k: int = 20,
        temperature: float = 0.07,
        lr: float = 0.1,
        momentum: float = 0.9,
    ) -> None:
        self._labels = labels.to(device)
        self._classes = int(labels.max()) + 1
        self._k, self._temperature, self._lr, self._momentum = k, temperature, lr, momentum
        self._bank_size, self._next = bank, 0
        self._counts = torch.zeros(3, device=device)
        """Scored images since the last reading, right ones of the head, right ones of kNN."""
        self._rows: Tensor | None = None

    @torch.no_grad()
    def add(self, features: Tensor, sample_ids: Tensor) -> None:
        """Score the images that are kept aside, then learn from the others.

        A micro-batch with a number that is not finite is neither scored nor learnt.

        Args:
            features: [B, D], target features of a micro-batch averaged over patches.
            sample_ids: int64 [B], on any device.
        """
        with torch.autocast(features.device.type, enabled=False):
            x = features.detach().float()
            good = x.isfinite().all()
            x = x.where(good, torch.zeros_like(x))
            ids = sample_ids.to(x.device, non_blocking=True)
            y, scored = self._labels[ids], (ids % _SHARE == 0) & good
            learnt = ~scored & good
            if self._rows is None:
                self._start(x)
            standard = self._standardised(x, good)
            logits = standard @ self._weights[:-1] + self._weights[-1]
            right = torch.stack([logits.argmax(1) == y, self._vote(x) == y]) & scored
            self._counts += torch.cat([scored.sum()[None], right.sum(1)])
            self._learn(standard, logits, y, learnt)
            self._remember(x, y, learnt)

    def read(self) -> dict[str, float]:
        """Percent right since the last reading (a host sync); nothing where none was scored."""
        scored, linear, knn = self._counts.tolist()
        self._counts.zero_()
        if not scored:
            return {}
        return {
            "online_linear_top1": round(100 * linear / scored, 2),
            "online_knn_top1": round(100 * knn / scored, 2),
        }

    def _start(self, x: Tensor) -> None:
        width = x.shape[1]
        self._rows = x.new_zeros(self._bank_size, width)
        self._row_labels = self._labels.new_zeros(self._bank_size)
        self._valid = torch.zeros(self._bank_size, dtype=torch.bool, device=x.device)
        self._mean, self._var = x.mean(0), x.var(0, correction=0)
        self._weights = x.new_zeros(width + 1, self._classes)
        self._velocity = torch.zeros_like(self._weights)

    def _standardised(self, x: Tensor, good: Tensor) -> Tensor:
        share = 0.05 * good
        self._mean.lerp_(x.mean(0), share)
        self._var.lerp_(x.var(0, correction=0), share)
        return (x - self._mean) / (self._var + 1e-6).sqrt()

    def _vote(self, x: Tensor) -> Tensor:
        assert self._rows is not None  # since _start
        cosine = F.normalize(x, dim=1) @ self._rows.T
        cosine = cosine.masked_fill(~self._valid, -torch.inf)
        cosine, nearest = cosine.topk(min(self._k, len(self._rows)), dim=1)
        votes = x.new_zeros(len(x), self._classes)
        # An empty place votes with exp(-inf) = 0.
        votes.scatter_add_(1, self._row_labels[nearest], (cosine / self._temperature).exp())
        return votes.argmax(1)

    def _learn(self, x: Tensor, logits: Tensor, y: Tensor, learnt: Tensor) -> None:
        error = logits.softmax(1)
        error[torch.arange(len(y), device=y.device), y] -= 1
        error = error * learnt[:, None] / learnt.sum().clamp_min(1)
        gradient = torch.cat([x.T @ error, error.sum(0)[None]])
        self._velocity.mul_(self._momentum).add_(gradient)
        self._weights.sub_(self._velocity, alpha=self._lr)

    def _remember(self, x: Tensor, y: Tensor, learnt: Tensor) -> None:
        """All rows take a place, so that no shape depends on the data; others are not valid."""
        assert self._rows is not None
        where = torch.arange(self._next, self._next + len(x), device=x.device) % len(self._rows)
        self._rows[where], self._row_labels[where] = F.normalize(x, dim=1), y
        self._valid[where] = learnt
        self._next = (self._next + len(x)) % len(self._rows)
