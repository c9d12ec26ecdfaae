"""What kinds of files and folders hold weights, and how each is opened."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from njepa.config import ConfigError, parse_config
from njepa.config.reading import read_yaml
from njepa.config.sections import PredictorContext
from njepa.exchange.files import as_object, read_json, read_metadata, read_safetensors, read_torch
from njepa.exchange.layouts import State, to_ours
from njepa.exchange.weights import FACTS, Channels, Weights
from njepa.models.architecture import architecture
from njepa.runs.checkpoint_files import INDEX, STATE, TARGET, CheckpointFiles, is_plain_name
from njepa.runs.checkpoints import good_checkpoint


def open_path(path: Path) -> Weights:
    """See ``reading.open_weights``."""
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        # What stands beside it says heads, mean and std, which its tensors do not.
        described = any((path.parent / name).is_file() for name in (FACTS, "config.json"))
        if path.name == "model.safetensors" and described:
            return _open_folder(path.parent)
        return _open_safetensors(path)
    if path.suffix in (".tar", ".pth", ".pt", ".bin"):
        return _open_published(path)
    raise ConfigError(
        f"{path}: expected weights in a .safetensors, .pth.tar, .pth, .pt or .bin file, got a "
        f"{path.suffix or 'file without an ending'}; ONNX and other graphs cannot be read back"
    )


def cached_repository(name: str) -> Path | None:
    """The folder of ``owner/name``, or of timm's model ``name``, in Hugging Face's cache."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return None
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        repository = name if "/" in name else f"timm/{name}"
        return Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _open_folder(path: Path) -> Weights:
    if (path / "config.yaml").is_file():
        checkpoint = good_checkpoint(path, (STATE, TARGET))
        if checkpoint is None:
            raise ConfigError(f"run {path} has no complete checkpoint yet; train it first")
        return _open_checkpoint(checkpoint, path)
    if (path / INDEX).is_file() or (path / STATE).is_file():
        checkpoint = CheckpointFiles(path)
        checkpoint.verify((STATE, TARGET))
        return _open_checkpoint(checkpoint, path.parent.parent)
    if (path / FACTS).is_file():
        return _open_safetensors(path / "model.safetensors", read_json(path / FACTS))
    if (path / "config.json").is_file():
        return _open_hugging_face(path, read_json(path / "config.json"))
    if (path / "model.safetensors").is_file():  # timm caches no more of its own models
        return _open_safetensors(path / "model.safetensors")
    published = list(path.glob("*.pth.tar"))
    if len(published) == 1:
        return _open_published(published[0])
    inside = sorted(p.name for p in path.iterdir())
    raise ConfigError(
        f"{path} holds no weights: expected a run (config.yaml), a checkpoint (state.json), an "
        f"export ({FACTS}), a folder of timm or transformers (config.json) or of one .pth.tar, got "
        f"{', '.join(inside[:8]) or 'an empty folder'}"
    )


def _open_checkpoint(checkpoint: CheckpointFiles, run: Path) -> Weights:
    """``checkpoints/step-N`` of a run."""
    state, path = checkpoint.state(), checkpoint.folder / STATE
    if missing := [key for key in ("config", "step") if key not in state]:
        raise ConfigError(
            f"{path} has no {', '.join(missing)}: no checkpoint of this trainer; use another one"
        )
    config = parse_config(read_yaml(str(state["config"]), f"{path}, config"), origin=f"{path}")
    parts = architecture(config)

    def context() -> State:
        checkpoint.verify()
        return checkpoint.below("jepa.encoder.")

    def predictors() -> dict[str, State]:
        checkpoint.verify()
        states = {n: checkpoint.below(f"jepa.{n}.") for n in ("predictor", "noise_predictor")}
        return {name: state for name, state in states.items() if state}

    encoders: dict[str, Callable[[], State]] = {
        "target": partial(read_safetensors, checkpoint.folder / TARGET),
        "context": context,
    }
    summary = run / "summary.json"
    record = {
        "recipe": config.recipe,
        "method": config.method,
        "step": state["step"],
        "config": state["config"],
        "versions": as_object(state.get("versions", {}), f"{path}, versions"),
        "data_digest": str(state.get("data_digest", "")),
        "summary": read_json(summary) if summary.is_file() else {},
    }
    return Weights(
        f"run {run}, step {state['step']}",
        encoders,
        predictors,
        parts.encoder.heads,
        parts.predictor.heads,
        config.model.predictor.context,
        (config.data.mean, config.data.std),
        image_size=config.data.image_size,
        record=record,
    )


def _open_safetensors(path: Path, facts: dict[str, Any] | None = None) -> Weights:
    """One encoder under our names or transformers', alone or with what is known about it."""
    facts = facts if facts is not None else dict(read_metadata(path))
    encoders: dict[str, Callable[[], State]] = {
        str(facts.get("which", "only")): partial(read_safetensors, path)
    }
    return Weights(
        str(path), encoders, heads=_heads(facts.get("heads"), path), mean_std=_mean_std(facts)
    )


def _open_published(path: Path) -> Weights:
    """``{encoder, target_encoder, predictor, ...}`` of facebookresearch/ijepa, src/train.py."""
    found = read_torch(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a dictionary, got {type(found).__name__}")
    facts = as_object(found.get("njepa", {}), f"{path}, njepa")  # of our own exports
    heads, own = (_heads(facts.get(name), path) for name in ("heads", "predictor_heads"))
    names = {"context": "encoder", "target": "target_encoder"}
    states = {w: found[key] for w, key in names.items() if _is_state(found.get(key))}
    if not states and _is_state(found):
        states = {"only": found}
    if not states:
        raise ConfigError(
            f"{path} holds no weights: expected the keys encoder and target_encoder of official "
            f"files, or a state dict, got {', '.join(map(str, list(found)[:8])) or 'nothing'}; "
            f"where an encoder of this family lies deeper, save its state dict alone"
        )
    predictors = {
        name: to_ours(found[name])
        for name in ("predictor", "noise_predictor")
        if _is_state(found.get(name))
    }
    if facts.get("encoder") == "target":  # put where other libraries look
        states.pop("context")
        if _is_state(found.get("context_encoder")):
            states["context"] = found["context_encoder"]
    elif facts.get("encoder") == "only":
        states = {"only": found["encoder"]}
    return Weights(
        f"{path}",
        {w: partial(dict, state) for w, state in states.items()},
        lambda: predictors,
        heads,
        own,
        _predictor_context(facts, path),
        _mean_std(facts),
        record={"epoch": found["epoch"]} if isinstance(found.get("epoch"), int) else {},
    )


def _open_hugging_face(path: Path, config: dict[str, Any]) -> Weights:
    """A folder of timm (``architecture``) or transformers (``model_type``)."""
    told = f"{path / 'config.json'}"
    facts = as_object(config.get("njepa") or {}, f"{told}, njepa")
    if config.get("model_type") == "ijepa":
        if config.get("hidden_act", "gelu") != "gelu":
            raise ConfigError(f"{path}: hidden_act must be gelu, got {config['hidden_act']}")
        heads = config.get("num_attention_heads", 12)
        file = path / "preprocessor_config.json"
        given = read_json(file) if file.is_file() else {}
        given = {"mean": given.get("image_mean"), "std": given.get("image_std")}
    elif "architecture" in config:
        heads = as_object(config.get("model_args") or {}, f"{told}, model_args").get("num_heads")
        given = as_object(config.get("pretrained_cfg") or config, f"{told}, pretrained_cfg")
    else:
        kind = config.get("model_type", "no model_type and no architecture")
        raise ConfigError(
            f"{told}: expected model_type ijepa (transformers) or an architecture (timm), got "
            f"{kind}; other networks cannot be read"
        )
    which = str(facts.get("which", "only"))
    return Weights(
        f"{path}",
        {which: partial(_folder_state, path)},
        heads=_heads(heads, path),
        mean_std=_mean_std(given),
    )


def _folder_state(path: Path) -> State:
    """The tensors of a folder, in one file or listed by an index of several."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        places = as_object(read_json(index).get("weight_map"), f"{index}, weight_map")
        outside = [name for name in places.values() if not is_plain_name(name)]
        if outside:
            raise ConfigError(f"{index} names files outside of its folder: {outside}")
        state: State = {}
        for name in sorted(set(places.values())):
            state |= read_safetensors(path / name)
        return state
    if (path / "model.safetensors").is_file():
        return read_safetensors(path / "model.safetensors")
    file = path / "pytorch_model.bin"
    if not file.is_file():
        raise ConfigError(f"{path}: expected model.safetensors or pytorch_model.bin, got neither")
    found: State = read_torch(file)
    if not _is_state(found):
        raise ConfigError(f"{file} must hold a state dict, got {type(found).__name__}")
    return found


def _heads(value: object, path: Path) -> int | None:
    """Attention heads, as a file says them: a number, or its digits in safetensors' metadata."""
    if value is None:
        return None
    if not re.fullmatch(r"0*[1-9]\d{0,5}", str(value), re.ASCII):
        raise ConfigError(f"{path}: the number of attention heads must be positive, got {value!r}")
    return int(str(value))


def _predictor_context(facts: dict[str, Any], path: Path) -> str | None:
    found = facts.get("predictor_context")
    known = get_args(PredictorContext)
    if found is not None and found not in known:
        raise ConfigError(
            f"{path}: predictor_context must be one of {', '.join(known)}, got {found!r}"
        )
    return found


def _mean_std(facts: dict[str, Any]) -> tuple[Channels, Channels] | None:
    mean, std = facts.get("mean"), facts.get("std")
    if not isinstance(mean, list | tuple) or not isinstance(std, list | tuple):
        return None
    if len(mean) != 3 or len(std) != 3 or not all(_is_number(x) for x in (*mean, *std)):
        raise ConfigError(f"mean and std must be three numbers each, got {mean} and {std}")
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_state(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )
