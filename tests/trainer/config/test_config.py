"""Configuration: typed, strict, and helpful where it refuses."""

import re

import pytest
import yaml

from njepa.config import (
    Config,
    ConfigError,
    Section,
    dump_config,
    free_on_resume,
    load_config,
    parse_config,
    recipe_names,
)
from njepa.config.loading import RETIRED

SMALL = {"data": {"image_size": 64}, "model": {"patch_size": 8}}


@pytest.mark.parametrize(
    ("method", "noise", "vicreg"),
    [("ijepa", 0, 0), ("cjepa", 0, 0.001), ("njepa", 0.1, 0), ("ncjepa", 0.1, 0.001)],
)
def test_method_only_sets_defaults(method, noise, vicreg):
    def weights(**sections):
        config = parse_config({"method": method, **sections})
        return config.noise.weight, config.noise.consistency, config.vicreg.weight

    assert weights() == (noise, noise, vicreg)
    given = {"noise": {"weight": 0.5, "consistency": 0.25}, "vicreg": {"weight": 2}}
    assert weights(**given) == (0.5, 0.25, 2)
    assert weights(noise={"weight": 0.5}) == (0.5, noise, vicreg)
    # A single predictor has no second prediction to be consistent with.
    assert weights(noise={"predictors": "single"}) == (noise, 0, vicreg)
    assert weights(noise={"predictors": "shared"}) == (noise, noise, vicreg)


@pytest.mark.parametrize("method", ["ijepa", "cjepa", "njepa", "ncjepa"])
def test_noise_and_vicreg_together_share_the_predictor_unless_told_otherwise(method):
    default = "shared" if method == "ncjepa" else "unshared"
    assert parse_config({"method": method}).noise.predictors == default
    for asked in ("unshared", "shared"):
        config = parse_config({"method": method, "noise": {"predictors": asked}})
        assert config.noise.predictors == asked


def test_the_defaults_of_the_noise_are_the_published_ones():
    noise = parse_config({"method": "njepa"}).noise
    assert noise.model_dump() == {
        "weight": 0.1, "consistency": 0.1, "consistency_stop": "none", "sigma": 0.5,
        "draw": "per_block", "predictors": "unshared", "mask_token": "unshared",
        "space": "predictor",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "consistency", "active"),
    [(0, 0, False), (0.1, 0, True), (0, 0.1, True), (0.1, 0.1, True)],
)
def test_noise_is_active_where_a_term_weighs(weight, consistency, active):
    noise = {"weight": weight, "consistency": consistency}
    assert parse_config({"method": "njepa", "noise": noise}).noise.active == active


@pytest.mark.parametrize(
    ("given", "read"),
    [(0, 0.0), (1, 1.0), (0.25, 0.25), ("edm", "edm"), ([1, 0.5], (1.0, 0.5)), ([0.1], (0.1,))],
)
def test_forms_of_sigma_survive_a_round_trip(given, read):
    config = parse_config({"method": "njepa", "noise": {"sigma": given}})
    assert config.noise.sigma == read
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    "value",
    [-0.1, float("nan"), float("inf"), "half", "0.5", [], True, None, {}, [0.5, -1], [0.5, "edm"],
     [0.5, True], [0.5, float("nan")], [[0.5]]],
    ids=repr,
)  # fmt: skip
def test_what_is_no_sigma_gets_one_message(value):
    with pytest.raises(ConfigError) as caught:
        parse_config({"method": "njepa", "noise": {"sigma": value}})
    _, *lines = str(caught.value).splitlines()
    expected = "noise.sigma must be a number >= 0, 'edm' or a list of numbers >= 0"
    assert len(lines) == 1
    assert expected in lines[0]
    assert lines[0].endswith(f"got {value!r}")


#: A value that each key had, as YAML.
OLD_VALUES = {
    "schedule": "karras", "levels": "4", "sigma_min": "0.05", "sigma_max": "2.0",
    "sigmas": "[1.0, 0.5]", "rho": "7", "jitter": "true", "anneal_to": "0.5", "unit": "relative",
    "map": "per_block", "mix": "ve", "level_weights": "uniform", "normalise": "true",
    "level_embedding": "add",
}  # fmt: skip


def test_every_retired_key_is_gone_and_tried():
    assert OLD_VALUES.keys() == RETIRED.keys()
    assert not RETIRED.keys() & parse_config({}).noise.model_dump().keys()


@pytest.mark.parametrize("key", RETIRED)
def test_a_retired_key_gets_one_message_that_names_its_successor(key):
    with pytest.raises(ConfigError) as caught:
        load_config("shapes-tiny", [f"noise.{key}={OLD_VALUES[key]}"])
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert lines[0].strip().startswith(f"noise.{key}: removed: ")
    assert lines[0].endswith(RETIRED[key])


def test_a_retired_key_elsewhere_is_an_unknown_key():
    with pytest.raises(ConfigError, match=r"optim\.levels: unknown key"):
        parse_config({"optim": {"levels": 4}})


@pytest.mark.parametrize("old", ["pred_vs_target", "context", "tokens"])
def test_old_tensors_of_vicreg_are_named(old):
    message = f"vicreg.on: input should be 'pred_blocks' or 'context_vs_target', got '{old}'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config({"method": "cjepa", "vicreg": {"on": old}})


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
        ({"noise": {"sigma": [1, 2, 3, 4, 5]}}, "has 5 values, [1.0, 2.0, 3.0, 4.0, 5.0], for "
         "mask.n_targets=4 blocks of an image; give at most 4 values or raise mask.n_targets"),
        ({"noise": {"sigma": [1, 0.5], "draw": "shared"}},
         "noise.draw=shared gives a patch the same noise in all blocks, but the list "
         "noise.sigma=[1.0, 0.5] gives the blocks different ones"),
        ({"noise": {"predictors": "single", "consistency": 0.1}},
         "noise.consistency=0.1 compares a clean and a noised prediction, but "
         "noise.predictors=single makes the noised one only; set noise.consistency=0"),
        ({"noise": {"predictors": 2}}, "'unshared', 'shared' or 'single', got 2"),
        ({"noise": {"weight": -1}}, "noise.weight: input should be greater than or equal to 0"),
        ({"noise": {"consistency": -1}}, "noise.consistency: input should be greater than or"),
        ({"noise": {"consistency_stop": "both"}}, "'none', 'clean' or 'noised', got 'both'"),
        ({"noise": {"draw": "per_image"}}, "'per_block' or 'shared', got 'per_image'"),
        ({"noise": {"mask_token": "single"}}, "'unshared' or 'shared', got 'single'"),
        ({"vicreg": {"weight": 1}, "mask": {"n_targets": 1}}, "needs mask.n_targets >= 2, got 1"),
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


def test_a_recipe_that_is_not_text(tmp_path):
    (tmp_path / "photo.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match=r"photo\.yaml cannot be read: .* can't decode"):
        load_config(str(tmp_path / "photo.yaml"))


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


def test_options_that_have_nothing_to_act_on_are_allowed():
    """A list longer than the blocks, and VICReg of one block, where their weights are 0."""
    config = parse_config({"method": "ijepa", "noise": {"sigma": [1, 2, 3, 4, 5]}})
    assert not config.noise.active
    one = {"mask": {"n_targets": 1}, "vicreg": {"on": "context_vs_target"}}
    assert parse_config({"method": "ncjepa", **one}).vicreg.weight == 0.001


def test_what_a_resumed_run_may_change():
    """What decides the result stays; where the data lies and how the run is watched may change."""
    sections = parse_config(SMALL).model_dump()
    keys = {"recipe", "method"}
    for name, section in sections.items():
        if isinstance(section, dict):
            keys |= {f"{name}.{key}" for key in section}
    free = {key for key in keys if free_on_resume(key)}
    watched = {key for key in keys if key.split(".")[0] in ("run", "eval", "impl")}
    assert free == (watched - {"run.seed", "run.max_steps"}) | {
        "recipe", "model.attention", "model.checkpoint_blocks", "model.fused_block",
        "model.target_dtype", "data.path", "data.eval_path", "data.backend", "data.workers",
        "data.prefetch", "data.hw_decoder_load", "data.cache_dir", "data.on_error",
        "data.max_bad_frac", "data.reduced_decode",
    }  # fmt: skip
    assert not free_on_resume("model.predictor.width")
    assert not free_on_resume("gone.key")
