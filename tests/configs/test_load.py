"""Recipes: what is accepted, and what a person is told about what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load_recipe, packaged_recipes
from configs.schema.training import PretrainConfig

RECIPE = """
name: small
stages:
  tokenizer: {source: {path: "python:stdlib"}}
  corpus: {tokenizer: tokenizer, source: {path: "python:stdlib"}}
  pretrain: {corpus: corpus, training: {steps: 10, compile: on, optim: {learning_rate: 1e-3}}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return str(path)


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    return str(path)


def pretrain(recipe: str, *overrides: str) -> PretrainConfig:
    stage = load_recipe(recipe, overrides).stages["pretrain"]
    assert isinstance(stage, PretrainConfig)
    return stage


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_loads_by_its_name(name: str) -> None:
    assert load_recipe(name).name


def test_on_is_a_word_and_scientific_notation_a_number(recipe: str) -> None:
    training = pretrain(recipe).training
    assert training.compile == "on"
    assert training.optim.learning_rate == 1e-3


def test_overrides_are_yaml_and_the_last_one_wins(recipe: str) -> None:
    stage = pretrain(
        recipe,
        "stages.pretrain.training.steps=7",
        "stages.pretrain.training.steps=8",
        "stages.pretrain.training.optim.betas=[0.8, 0.9]",
        "stages.pretrain.model.layers=3",
    )
    assert stage.training.steps == 8
    assert stage.training.optim.betas == (0.8, 0.9)
    assert stage.model.layers == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.pretrain.training.stpes=3", r"stages\.pretrain\.training\.stpes: unknown key; did you mean steps\?"),
        ("stages.pretrain.training.steps=no", r"stages\.pretrain\.training\.steps; received 'no'.*valid integer"),
        (
            "stages.pretrain.training.workers=[1,3]",
            r"stages\.pretrain\.training: batch_rows \d+ must be a multiple of 3",
        ),
        ("stages.pretrain.training.workers=[2,1]", r"workers \(2, 1\) must be the fewest and the most, in this order"),
        ("stages.pretrain.training.batch_rows=3", r"stages\.pretrain\.training: batch_rows 3 must be a multiple of"),
        ("stages.pretrian.training.steps=4", r"no stage 'pretrian'; did you mean pretrain\?"),
        ("pretrain.training.steps=4", r"did you mean stages\.pretrain\.training\.steps\?"),
        ("stages.pretrain.training.steps.x=4", r"steps is not a mapping"),
        ("stages.pretrain.training.optim.name=sgd", r"received 'sgd'; allowed: 'adamw' or 'muon'"),
        ("stages.pretrain.corpus=corpsu", r"stages\.pretrain\.corpus names no stage: received 'corpsu'"),
        ("stages.pretrain.kind=pretran", r"did you mean pretrain\?; received 'pretran'"),
        ("steps", r"--set takes KEY=VALUE; received 'steps'"),
        ("stages.pretrain.training.steps=[", r"--set stages\.pretrain\.training\.steps, line 1"),
    ],
)
def test_a_wrong_override_is_told_by_key_value_and_what_is_allowed(recipe: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, [override])


def test_several_problems_come_as_one_error(recipe: str) -> None:
    with pytest.raises(ConfigError, match="2 problems") as caught:
        load_recipe(recipe, ["version=0", "stages.corpus.foo=1"])
    assert "version; received 0" in str(caught.value)
    assert "stages.corpus.foo: unknown key" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "line 2, column 1: key 'name' is written twice"),
        ("name: [\n", "line 2"),
        ("3", "a recipe is a mapping; received 3"),
        ("name: a\n", "stages is missing"),
        ("name: a\nstages: {foo: {x: 1}}\n", "stages.foo: unknown kind of stage; received 'foo'"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(written(tmp_path, text))


def test_a_recipe_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean demo\?"):
        load_recipe("demmo")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_keys_with_dots_are_found_whole(tmp_path: Path) -> None:
    text = RECIPE.replace("pretrain:", "v1.5:").replace("v1.5: {", "v1.5: {kind: pretrain, ")
    stage = load_recipe(written(tmp_path, text), ["stages.v1.5.training.steps=3"]).stages["v1.5"]
    assert isinstance(stage, PretrainConfig)
    assert stage.training.steps == 3
