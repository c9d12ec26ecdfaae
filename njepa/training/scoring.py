"""The encoders of a run on labelled images: now and then, and at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from njepa.choice import Choice
from njepa.config import Config
from njepa.evaluation.evaluate import Evaluator, report
from njepa.models.encoder import Encoder, build_encoder
from njepa.training.compiling import eagerly
from njepa.training.ema import frozen_copy
from njepa.training.step import TrainState, encode_with

#: Encoders by the suffix of their keys.
Encoders = dict[str, Callable[[Tensor], Tensor]]


class Scoring:
    """Scores of the encoders of ``eval.which``; none where there is no evaluator."""

    def __init__(
        self, config: Config, state: TrainState, compilation: Choice, evaluator: Evaluator | None
    ) -> None:
        """``evaluator``: on rank 0, where there are labelled test images."""
        self.evaluator, self._config, self._state = evaluator, config, state
        self._compilation = compilation

    def encoders(self) -> Encoders:
        """What will be evaluated. Collective.

        The context encoder is a copy outside of the engine: evaluating it moves nothing there.
        """
        which, state = self._config.eval.which, self._state
        found: dict[str, Encoder] = {} if which == "context" else {"": state.target}
        if which != "target":
            with state.engine.whole(state.online) as online:
                if self.evaluator is not None:
                    found["_context" if found else ""] = frozen_copy(state.target, online)
        return {
            suffix: partial(encode_with, state.engine, encoder) for suffix, encoder in found.items()
        }

    def knn(self, encoders: Encoders) -> dict[str, Any]:
        """The quick score, for a line of metrics.jsonl."""
        scores: dict[str, Any] = {}
        if self.evaluator is not None:
            with eagerly(self._compilation):
                for suffix, encode in encoders.items():
                    scores |= report(f"knn_top1{suffix}", self.evaluator.knn(encode))
        return scores

    def final(self, encoders: Encoders, device: torch.device) -> dict[str, Any]:
        """All scores, beside those of the untrained network and of raw pixels."""
        scores: dict[str, Any] = {}
        if self.evaluator is not None:
            untrained = build_encoder(self._config).to(device).eval()
            with eagerly(self._compilation):
                for suffix, encode in encoders.items():
                    scores |= self.evaluator.final(encode, suffix)
                scores |= self.evaluator.floors(untrained)
        return scores
