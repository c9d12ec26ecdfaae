"""``model.init_from``: a run that starts from weights instead of random numbers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, NamedTuple

from njepa.config import Config, ConfigError
from njepa.config.sections import UNSET
from njepa.exchange.layouts import State, check_predictor, predictor_facts
from njepa.exchange.positions import resize_positions
from njepa.exchange.reading import EncoderWeights, Weights, Which, open_weights
from njepa.models.architecture import SIZES, Architecture, Stack, architecture
from njepa.models.encoder import Encoder
from njepa.models.jepa import Jepa
from njepa.models.predictor import Predictor

log = logging.getLogger(__name__)


class _Given(NamedTuple):
    """A number that source and configuration must agree on."""

    key: str
    source: object
    config: object


@dataclass(frozen=True)
class InitialWeights:
    """Read and checked: they fit the network of the configuration."""

    context: State
    target: State
    predictors: dict[str, State]
    """Empty: the predictors of the run keep their random weights."""
    told: str
    """What they are, for the first lines of the log."""

    def load_into(self, jepa: Jepa, target: Encoder) -> None:
        """Overwrite the weights of a new network, before its engine is built."""
        jepa.encoder.load_state_dict(self.context)
        target.load_state_dict(self.target)
        if not self.predictors:
            return
        # In this order, because a mask token that both predictors share is to be the clean one's.
        if jepa.noise_predictor is not None:
            _load_predictor(jepa.noise_predictor, self._noised())
        _load_predictor(jepa.predictor, self.predictors["predictor"] | self._noised_token())

    def _noised_token(self) -> State:
        """The mask token of noised queries under its name in a shared predictor."""
        token = self._noised()["mask_token"]
        return {"noise_mask_token": token}

    def _noised(self) -> State:
        """A predictor for noised queries: the source's own, else a copy of its only one."""
        state = self.predictors.get("noise_predictor", self.predictors["predictor"])
        return state | {"mask_token": state.get("noise_mask_token", state["mask_token"])}


def read_initial_weights(config: Config) -> InitialWeights | None:
    """What ``model.init_from`` names, None where it is not set.

    Raises:
        ConfigError: it cannot be read, or is another architecture than the configuration's.
    """
    model = config.model
    if model.init_from is None:
        return None
    if model.init_from == UNSET:
        raise ConfigError(
            "model.init_from is not set, and this recipe continues from weights; add "
            "model.init_from=PATH: a run, an official .pth.tar, or a folder of timm or transformers"
        )
    weights, parts = open_weights(model.init_from), architecture(config)
    context, target = (_encoder(weights, model.init_which, own) for own in ("context", "target"))
    for encoder in {context.which: context, target.which: target}.values():
        _check_encoder(encoder, config, parts)
    predictors = _predictors(weights, config, parts) if model.init_predictor else {}
    context_of = weights.predictor_context
    if predictors and context_of not in (None, model.predictor.context):
        log.warning(
            "the predictor of %s was trained with model.predictor.context=%s and goes on with %s, "
            "which is another model: it has to learn again. Set model.predictor.context=%s to go "
            "on with the same",
            weights.origin,
            context_of,
            model.predictor.context,
            context_of,
        )
    side = config.grid[0]
    told = f"{weights.origin}: context encoder from {context.which}, target from {target.which}"
    told += f", {' and '.join(predictors) or 'no predictor'}"
    if context.image_size != config.data.image_size:
        told += f"; positions of {context.image_size} px resized to {config.data.image_size} px"
    return InitialWeights(
        _resized(context.state, "pos_embed", side),
        _resized(target.state, "pos_embed", side),
        {n: _resized(state, "predictor_pos_embed", side) for n, state in predictors.items()},
        told,
    )


def _encoder(weights: Weights, wanted: Which | Literal["both"], own: Which) -> EncoderWeights:
    """The one for encoder ``own`` of the run. ``both``: its own where the source has both."""
    if wanted != "both":
        return weights.encoder(wanted)
    other: Which = "target" if own == "context" else "context"
    return weights.encoder(own if own in weights.encoders else other)


def _check_encoder(encoder: EncoderWeights, config: Config, parts: Architecture) -> None:
    size = parts.encoder
    given = [
        _Given("model.width", encoder.width, size.width),
        _Given("model.depth", encoder.depth, size.depth),
        _Given("model.heads", encoder.heads, size.heads),
        _Given("model.patch_size", encoder.patch_size, parts.patch_size),
        _Given("data.mean", list(encoder.mean), list(config.data.mean)),
        _Given("data.std", list(encoder.std), list(config.data.std)),
    ]
    names = [name for name, named in SIZES.items() if encoder.stack[:3] == named[:3]]
    hint = f" ({names[0]} has this size)" if names else ""
    _check_same(given, f"model.init_from={config.model.init_from} ({encoder.origin})", hint)
    if encoder.hidden != size.hidden:  # no key of its own: the named size decides
        raise ConfigError(
            f"model.init_from={config.model.init_from} has an MLP of width {encoder.hidden}, "
            f"expected {size.hidden} for model.encoder={config.model.encoder}; set model.encoder "
            f"to the size it was made with, of {', '.join(SIZES)}"
        )


def _predictors(weights: Weights, config: Config, parts: Architecture) -> dict[str, State]:
    states, size = weights.predictors(), parts.predictor
    if "predictor" not in states:
        return {}
    for name, state in states.items():
        told = f"{weights.origin}, {name}"
        width, depth, hidden, side = predictor_facts(state, told)
        heads = weights.predictor_heads or weights.heads or parts.encoder.heads
        given = [
            _Given("model.predictor.width", width, size.width),
            _Given("model.predictor.depth", depth, size.depth),
            _Given("model.predictor.heads", heads, size.heads),
        ]
        _check_same(
            given,
            f"the predictor of model.init_from={config.model.init_from}",
            hint=", or model.init_predictor=false, to begin with a new predictor",
        )
        check_predictor(state, parts.encoder.width, Stack(width, depth, heads, hidden), side, told)
    return {name: {k: v.float() for k, v in state.items()} for name, state in states.items()}


def _check_same(given: list[_Given], what: str, hint: str = "") -> None:
    differ = [x for x in given if x.source != x.config]
    if differ:
        got, expected = (
            " ".join(f"{x.key}={value}".replace(" ", "") for x, value in side)
            for side in ([(x, x.source) for x in differ], [(x, x.config) for x in differ])
        )
        raise ConfigError(
            f"{what} does not fit the configuration: got {got}, expected {expected}; "
            f"set {got}{hint}"
        )


def _resized(state: State, name: str, side: int) -> State:
    return state | {name: resize_positions(state[name], side)}


def _load_predictor(predictor: Predictor, state: State) -> None:
    own = predictor.state_dict().keys()
    predictor.load_state_dict({name: state[name] for name in own})
