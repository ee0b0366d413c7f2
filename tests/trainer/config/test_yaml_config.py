import argparse

import pytest

from shards.common.errors import UserError
from shards.storage.location import Location
from tests.support import REPOSITORY
from trainer.config.settings import Config, ConfigError, StageConfig
from trainer.config.yaml_config import add_arguments, from_arguments, load_config, read_config, recipes, save_config


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
    ("name", "kind", "hint"),
    [
        ("trafic", "config", "did you mean traffic or traffic-coco.*he packaged recipes are coco, "),
        ("configs/fast.yaml", "config", "did you mean fast.*he packaged recipes are coco, "),
        ("./none.yaml", "config", "the packaged recipes are coco, "),
        ("compare-layer", "comparison", "did you mean compare-layers.*The packaged comparisons are c"),
    ],
)
def test_a_missing_file_is_an_error_that_lists_the_packaged_ones(name, kind, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"{kind} {name}: not found: .*{hint}"):
        read_config(name, kind)


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {batch_size: 3, workers: 1}\noptim: {lr: 1e-2}\n")
    config = load_config(str(tmp_path / "c.yaml"), [("data.workers", "5"), ("model.mask_head_channels", "[8, 8]")])
    assert (config.data.batch_size, config.data.workers, config.optim.lr) == (3, 5, 0.01)
    assert config.model.mask_head_channels == [8, 8]
    assert config.optim.momentum == Config().optim.momentum


def test_a_text_where_a_list_of_texts_is_expected_is_a_list_of_one(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {classes: Traffic light}")
    assert load_config(str(tmp_path / "c.yaml")).data.classes == ["Traffic light"]
    assert load_config(None, [("data.classes", "Person"), ("run.trackers", "[wandb]")]).data.classes == ["Person"]


def test_saved_settings_read_back_the_same(tmp_path):
    config = load_config(None, [("data.shards", "s3://bucket/x"), ("optim.milestones", "[1, 2]")])
    save_config(config, Location(str(tmp_path / "config.yaml")))
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_true_and_false_still_switch_compilation(tmp_path):
    """As in the configurations of earlier releases; YAML reads no as false."""
    for text, mode in (("true", "default"), ("false", "no"), ("no", "no"), ("max-autotune", "max-autotune")):
        (tmp_path / "config.yaml").write_text(f"train: {{compile: {text}}}")
        assert load_config(str(tmp_path / "config.yaml")).train.compile == mode
        assert load_config(None, [("train.compile", text)]).train.compile == mode


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data.bach_size", "4", "unknown option 'data.bach_size': did you mean data.batch_size"),
        ("nosuch.key", "4", "unknown option 'nosuch.key'"),
        ("data.batch_size", "many", "data.batch_size: 'many' is not a whole number"),
        ("data.batch_size", "2024-13-45", "data.batch_size: '2024-13-45' is not a whole number"),
        ("data.batch_size", "--5", "data.batch_size: '--5' is not a whole number"),
        pytest.param("optim.milestones", "[" * 2000, r"is not a list such as \[1, 2\]", id="nested"),
        ("data.batch_size", "true", "data.batch_size: True is not a whole number"),
        ("data.batch_size", "-1", "data.batch_size is -1: it must be at least 0"),
        ("data.group_by_aspect", "1", "1 is not true or false"),
        ("data.resize", "round", "'round' is not one of square, shortest, oriented, scale_jitter"),
        ("data.resize", "oriented", "data.resize is oriented, .*: set data.group_by_aspect"),
        ("train.compile", "fast", "'fast' is not one of no, default, reduce-overhead, max-autotune"),
        ("data.flip", "1.5", "data.flip is 1.5: it must be between 0 and 1"),
        ("data.rotate", "181", "data.rotate is 181.0: it must be between 0 and 180"),
        ("data.min_size", "2000", "data.min_size 2000 is above data.max_size 1024"),
        ("data.scale_range", "[2.0, 0.1]", r"scale_range is \[2.0, 0.1\]: give the smallest scale before the largest"),
        ("data.scale_range", "[0.1, .inf]", r"data.scale_range is \[0.1, inf\]: give a finite number"),
        ("model.anchor_sizes", "3", r"3 is not a list such as \[1, 2\]"),
        ("model.anchor_sizes", "[0, 1, 2, 3, 4]", r"model.anchor_sizes is \[0, 1, 2, 3, 4\]: it must be at least 1"),
        ("model.anchor_sizes", "[1, 2]", "anchor_sizes has 2 values: the FPN has 5 levels"),
        ("model.anchor_ratios", "[0.0]", r"model.anchor_ratios is \[0.0\]: it must be at least"),
        ("model.rpn_pre_nms", "[1]", r"model.rpn_pre_nms is \[1\]: give two numbers, \[training, inference\]"),
        ("optim.lr", ".nan", "optim.lr is nan: give a finite number, at least 0"),
        ("run.trackers", "[wandb", r"'\[wandb' is not a list such as \[1, 2\]"),
        ("data.classes", "", r"None is not a list such as \[1, 2\]"),
        ("train.stages", "[{layer: heads}]", "train.stages: unknown key 'layer': did you mean layers"),
        ("train.stages", "[heads]", r"'heads' is not keys and values such as \{layers: heads"),
        ("train.stages", "[{epochs: many}]", "train.stages.epochs: 'many' is not a whole number"),
        ("train.stages", "[{epochs: 0}]", r"train.stages\[0\].epochs is 0: it must be at least 1"),
        ("train.layers", "7+", r"train\.layers is '7\+'"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(name, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(None, [(name, text)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "shortest", "compile": "default"}, "train.compile is default, .* set data.resize to square or"),
        ({"mosaic": "0.5", "batch_size": "3"}, "data.mosaic joins four images .* set data.batch_size to 4 or more"),
        ({"iou_crop": "0.5", "resize": "oriented", "group_by_aspect": "true"}, "data.iou_crop changes orientations"),
        ({"unmasked": "masks", "rotate": "10"}, "loss.unmasked is masks, .* set both to 0, or loss.unmasked to box"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message):
    sections = {"compile": "train", "unmasked": "loss"}
    named = [(f"{sections.get(name, 'data')}.{name}", text) for name, text in options.items()]
    with pytest.raises(UserError, match=message):
        load_config(None, named)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dta: {}", r"config .*c.yaml: unknown section 'dta': did you mean data"),
        ("data: 3", r"section 'data' holds 3"),
        ("- 1", r"c.yaml: holds list"),
        ("data: {", r"config .*c.yaml: not YAML"),
        ("data: {batch_size: !!bool x}", r"not YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / "c.yaml"))


def test_arguments_become_settings_and_resume_is_short_for_an_option():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    stages = "[{layers: heads, epochs: 2}, {layers: last 10%, lr: 1e-1}]"
    config = from_arguments(parser.parse_args(["--train.stages", stages, "--data.val_split", ""]))
    assert config.train.stages == [StageConfig("heads", 2, 1.0), StageConfig("last 10%", 1, 0.1)]
    assert config.data.val_split == ""
    for words, value in (([], ""), (["--resume"], "last"), (["--resume", "runs/a"], "runs/a")):
        assert from_arguments(parser.parse_args(words)).run.resume == value
