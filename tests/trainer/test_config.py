"""Configuration: typed, strict, and helpful where it refuses."""

import re

import pytest

from njepa.config import Config, ConfigError, Section, dump_config, parse_config
from njepa.recipes import load_config, recipe_names

SMALL = {"data": {"image_size": 64}, "model": {"patch_size": 8}}


@pytest.mark.parametrize(
    ("method", "noise", "vicreg"),
    [("ijepa", 0, 0), ("cjepa", 0, 0.001), ("njepa", 1, 0), ("ncjepa", 1, 0.001)],
)
def test_method_only_sets_defaults(method, noise, vicreg):
    config = parse_config({"method": method})
    assert (config.noise.weight, config.vicreg.weight) == (noise, vicreg)
    explicit = parse_config({"method": method, "noise": {"weight": 0.5}, "vicreg": {"weight": 2}})
    assert (explicit.noise.weight, explicit.vicreg.weight) == (0.5, 2)


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("method", ["ijepa", "cjepa", "njepa", "ncjepa"])
def test_every_recipe_reads_for_every_method_and_survives_a_round_trip(name, method, tmp_path):
    config = load_config(name, [f"method={method}", "data.path=photos"])
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(str(file)) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"data": {"pth": 1}}, "data.pth: unknown key; did you mean 'path'?"),
        ({"data": {"eval_path": "test"}}, "data.eval_path=test needs data.path, got none"),
        ({"datas": {}}, "datas: unknown key; did you mean 'data'?"),
        ({"mask": {"ragged": True, "static_shapes": True}}, "got both true; set one of them"),
        ({"model": {"lr": 1}}, "lr lives in section 'optim'"),
        ({"optim": {"batch_size": 8}}, "optim.batch_size: belongs to the DeepSpeed file"),
        ({"gradient_clipping": 1}, "gradient_clipping: belongs to the DeepSpeed file"),
        ({"optim": {"lr": "fast"}}, "optim.lr: input should be a valid number"),
        ({"optim": {"lr": -1}}, "optim.lr: input should be greater than 0, got -1"),
        ({"optim": {"lr": float("nan")}}, "optim.lr: input should be a finite number"),
        ({"method": "jepa"}, "'ijepa', 'cjepa', 'njepa' or 'ncjepa', got 'jepa'"),
        ({"data": {"image_size": 65}}, "multiple of model.patch_size=16, got 65"),
        ({"data": {"crop_scale": [0.5, 0.2]}}, "data.crop_scale must be [low, high]"),
        ({"data": {"path": "???"}}, "data.path is not set"),
        ({"noise": {"levels": 5}}, "at most mask.n_targets=4 levels"),
        ({"noise": {"schedule": "fixed"}}, "has one level, got noise.levels=4"),
        ({"noise": {"sigma_min": 3}}, "sigma_min must not exceed noise.sigma_max, got 3.0 > 2.0"),
        ({"noise": {"sigmas": [1.0]}}, "noise.schedule=list only"),
        ({"noise": {"level_weights": [1, 2]}}, "needs noise.levels=4 numbers >= 0, got (1.0, 2.0)"),
        ({"vicreg": {"weight": 1}, "mask": {"n_targets": 1}, "noise": {"levels": 1}},
         "needs mask.n_targets >= 2, got 1"),
        ({"model": {"predictor": {"width": 30}}}, "must be a multiple of 4"),
    ],
)  # fmt: skip
def test_bad_values_are_named(raw, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(raw)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config({"optim": {"lr": "x", "epochs": 0}, "mask": {"compat": "paper"}})
    assert all(key in str(caught.value) for key in ("optim.lr", "optim.epochs", "mask.compat"))


def test_overrides_are_yaml_and_the_last_wins():
    config = load_config(
        "shapes-tiny",
        ["method=cjepa", "optim.lr=1e-3", "optim.lr=2e-3", "optim.ema=[0.9, 1]", "run.dir=null"],
    )
    assert config.method == "cjepa"
    assert config.vicreg.weight == 0.001
    assert config.optim.lr == 2e-3
    assert config.optim.ema == (0.9, 1.0)
    assert config.run.dir is None


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("shapes-tny", "", "did you mean 'shapes-tiny'?"),
        ("nowhere.yaml", "", "no such file"),
        (None, "lr", "override must be section.key=value, got 'lr'"),
        (None, "method.x=1", "'method' is not a section"),
        (None, "optim.lr=[1", "the value is not YAML"),
    ],
)
def test_recipe_and_override_errors(recipe, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(recipe, [override] if override else [])


def test_every_field_is_documented():
    def walk(model: type[Section], prefix: str) -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                missing += walk(field.annotation, f"{prefix}{name}.")
            elif not field.description and prefix + name != "model.predictor":
                missing.append(prefix + name)
        return missing

    assert walk(Config, "") == []


def test_a_bare_on_is_on(tmp_path):
    """YAML reads it as true, here as the name of a key."""
    file = tmp_path / "recipe.yaml"
    for value in ("pred_blocks", "context_vs_target"):
        file.write_text(f"method: cjepa\nvicreg:\n  on: {value}\n")
        assert load_config(str(file)).vicreg.on == value


def test_a_bare_off_is_off():
    """YAML reads it as false."""
    config = load_config("shapes-tiny", ["run.compile=off", "run.cuda_graphs=off"])
    assert (config.run.compile, config.run.cuda_graphs) == ("off", "off")
    with pytest.raises(ConfigError, match=r"run\.compile: .*'blocks'.*, got True"):
        load_config("shapes-tiny", ["run.compile=on"])
