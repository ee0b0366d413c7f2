import argparse
import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shards.storage import Location
from trainer.config import Config, ConfigError, add_arguments, from_arguments, load_config, save_config, sections

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(recipe):
    assert isinstance(load_config(str(recipe)), Config)


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
        ([("data.batch_size", "many")], r"data.batch_size: 'many' is not an int"),
        ([("data.batch_size", "2.5")], r"data.batch_size: 2.5 is not an int"),
        ([("data.batch_size", "true")], r"data.batch_size: True is not an int"),
        ([("data.batch_size", "0")], r"data.batch_size is 0: it must be at least 1"),
        ([("data.resize", "round")], r"'round' is not one of square, shortest"),
        ([("model.anchor_sizes", "3")], r"3 is not a list"),
        ([("model.anchor_sizes", "[1, 2]")], r"anchor_sizes has 2 values: the FPN has 5 levels"),
        ([("data.flip", "1.5")], r"data.flip is 1.5: it must be between 0 and 1"),
        ([("data.min_size", "2000")], r"data.min_size 2000 is above data.max_size 1024"),
        ([("data.group_by_aspect", "1")], r"1 is not a bool"),
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


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no such object"):
        load_config(str(tmp_path / "none.yaml"))


def test_help_describes_every_option():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = parser.format_help()
    for section, cls in sections().items():
        for item in dataclasses.fields(cls):
            assert f"--{section}.{item.name}" in text
            assert item.metadata["help"]


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
