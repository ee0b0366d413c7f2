import argparse

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shards.commands.options import entries
from shards.common.errors import UserError
from shards.storage.location import Location
from tests.support import REPOSITORY
from trainer.config.settings import Config, ConfigError, StageConfig
from trainer.config.yaml_config import add_arguments, from_arguments, load_config, recipes, save_config


@pytest.mark.parametrize("recipe", recipes())
def test_a_recipe_is_read_by_name_from_any_folder(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(recipe) == load_config(str(REPOSITORY / "configs" / f"{recipe}.yaml"))


def test_a_path_is_read_even_if_a_recipe_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "traffic.yaml").write_text("data: {batch_size: 3}")
    for name in ("./traffic.yaml", "traffic.yaml", str(tmp_path / "traffic.yaml")):
        assert load_config(name).data.batch_size == 3


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trafic", "did you mean traffic or traffic-coco"),
        ("configs/fast.yaml", "did you mean fast"),
        ("./none.yaml", "no such object"),
    ],
)
def test_a_missing_file_is_named_with_the_recipes(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"config {name}: cannot be read: .*{hint}.*Recipes are coco, demo, fast,"):
        load_config(name)


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {batch_size: 3, workers: 1}\noptim: {lr: 1e-2}\n")
    config = load_config(str(tmp_path / "c.yaml"), [("data.workers", "5"), ("model.mask_head_channels", "[8, 8]")])
    assert (config.data.batch_size, config.data.workers, config.optim.lr) == (3, 5, 0.01)
    assert config.model.mask_head_channels == [8, 8]
    assert config.optim.momentum == Config().optim.momentum


def test_saved_settings_read_back_the_same(tmp_path):
    config = load_config(None, [("data.shards", "s3://bucket/x"), ("optim.milestones", "[1, 2]")])
    save_config(config, Location(str(tmp_path / "config.yaml")))
    assert load_config(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("data.bach_size", "4")], r"unknown option 'data.bach_size': did you mean data.batch_size"),
        ([("nosuch.key", "4")], r"unknown option 'nosuch.key'"),
        ([("data.batch_size", "many")], r"data.batch_size: 'many' is not a whole number"),
        ([("data.batch_size", "2.5")], r"data.batch_size: 2.5 is not a whole number"),
        ([("data.batch_size", "true")], r"data.batch_size: True is not a whole number"),
        ([("data.batch_size", "0")], r"data.batch_size is 0: it must be at least 1"),
        ([("data.resize", "round")], r"'round' is not one of square, shortest, scale_jitter"),
        ([("model.anchor_sizes", "3")], r"3 is not a list such as \[1, 2\]"),
        ([("run.trackers", "wandb")], r"'wandb' is not a list such as \[wandb\]"),
        (
            [("model.anchor_sizes", "[0, 1, 2, 3, 4]")],
            r"model.anchor_sizes is \[0, 1, 2, 3, 4\]: it must be at least 1",
        ),
        ([("model.anchor_ratios", "[0.0]")], r"model.anchor_ratios is \[0.0\]: it must be at least"),
        (
            [("data.scale_range", "[2.0, 0.1]")],
            r"scale_range is \[2.0, 0.1\]: give the smallest scale before the largest",
        ),
        ([("model.anchor_sizes", "[1, 2]")], r"anchor_sizes has 2 values: the FPN has 5 levels"),
        ([("data.flip", "1.5")], r"data.flip is 1.5: it must be between 0 and 1"),
        ([("optim.lr", ".nan")], r"optim.lr is nan: give a finite number"),
        ([("optim.lr", ".inf")], r"optim.lr is inf: give a finite number"),
        ([("data.scale_range", "[0.1, .inf]")], r"data.scale_range is \[0.1, inf\]: give a finite number"),
        ([("train.ema", ".nan")], r"train.ema is nan: give a finite number"),
        ([("data.min_size", "2000")], r"data.min_size 2000 is above data.max_size 1024"),
        ([("data.group_by_aspect", "1")], r"1 is not true or false"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dta: {}", r"c.yaml: unknown section 'dta': did you mean data"),
        ("data: 3", r"section 'data' holds 3"),
        ("- 1", r"c.yaml: holds list"),
        ("data: {", r"not YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / "c.yaml"))


def test_help_describes_every_option():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = parser.format_help()
    for name, entry in entries(Config).items():
        assert f"--{name}" in text
        assert entry.item.metadata["help"]
        assert "\n" not in entry.item.metadata["help"]


def test_arguments_become_settings():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    config = from_arguments(parser.parse_args(["--optim.lr", "0.5", "--data.val_split", ""]))
    assert (config.optim.lr, config.data.val_split) == (0.5, "")


@given(st.floats(0, 1e6), st.integers(1, 10**6), st.lists(st.integers(0, 10**6), max_size=4), st.booleans())
def test_values_survive_yaml(lr, batch, milestones, group):
    values = {"data": {"batch_size": batch, "group_by_aspect": group}, "optim": {"lr": lr, "milestones": milestones}}
    overrides = [
        (f"{section}.{key}", yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n"))
        for section, entries in values.items()
        for key, value in entries.items()
    ]
    config = load_config(None, overrides)
    assert (config.data.batch_size, config.data.group_by_aspect) == (batch, group)
    assert (config.optim.lr, config.optim.milestones) == (lr, milestones)


def test_stages_are_typed_like_everything_else():
    config = load_config(None, [("train.stages", "[{layers: heads, epochs: 2}, {layers: last 10%, lr: 1e-1}]")])
    assert config.train.stages == [StageConfig("heads", 2, 1.0), StageConfig("last 10%", 1, 0.1)]
    for text, message in (
        ("[{layer: heads}]", r"train.stages: unknown key 'layer': did you mean layers"),
        ("[heads]", r"'heads' is not keys and values such as \{layers: heads"),
        ("[{epochs: many}]", r"train.stages.epochs: 'many' is not a whole number"),
        ("[{epochs: 0}]", r"train.stages\[0\].epochs is 0: it must be at least 1"),
        ("[{layers: tail}]", r"'tail'"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(None, [("train.stages", text)])


def test_resume_is_short_for_an_option():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for words, value in (([], ""), (["--resume"], "last"), (["--resume", "runs/a"], "runs/a")):
        assert from_arguments(parser.parse_args(words)).run.resume == value
