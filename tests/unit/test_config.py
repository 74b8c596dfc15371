"""The form's checks, and what a recipe makes of a filled-in form."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from mlpipe.config import LinearSettings, NetworkSettings, RunConfig, RunParams
from mlpipe.errors import UserError
from mlpipe.recipes import OF_THE_FORM, RECIPES, parse_models, resolve


def resolved(**values: object) -> RunConfig:
    return resolve(RunParams.from_mapping(values))


def test_an_empty_form_is_a_run_that_needs_no_network() -> None:
    config = resolved()
    assert config.data.dataset == "digits"
    assert [model.name for model in config.models] == ["custom_cnn", "logistic_regression", "resnet18"]
    assert {model.weights for model in config.models} == {"random", "none"}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("dataset", "mnist", "one of digits, cifar10, images"),
        ("data_uri", "x" * 3000, "2048"),
        ("epochs", 0, "from 1 to 1000"),
        ("epochs", "3", "a whole number"),
        ("batch_size", 10**9, "to 4096"),
        ("learning_rate", 0, "above 0"),
        ("image_size", 7, "from 8 to 512"),
        ("seed", -1, "from 0"),
    ],
)
def test_a_bad_value_is_refused_by_name_with_what_is_allowed(field: str, value: object, allowed: str) -> None:
    with pytest.raises(UserError, match=f"^{field}: .*") as refused:
        resolved(**{field: value})
    assert allowed in str(refused.value)
    assert "\n" not in str(refused.value)


SECRET = "https://us3r:passw0rd@h/w.pth?X-Amz-Signature=s1gnature"
CUT_BY_COMMA = "https://us3r:pass,w0rd@h/w.pth?X-Amz-Signature=s1gnature"


@pytest.mark.parametrize(
    ("message", "form"),
    [
        ("data_uri: .* is not used by the data set 'digits'", {"data_uri": SECRET}),
        ("data_uri: .* is not allowed", {"data_uri": SECRET + "x" * 2048}),
        ("data_uri: .* is not allowed", {"data_uri": [SECRET]}),
        ("dataset: .* is not allowed", {"dataset": SECRET}),
        ("epochs: .* is not allowed", {"epochs": {"address": SECRET}}),
        ("models: 17 models in ", {"models": ",".join([f"resnet18={SECRET}"] * 17)}),
        ("models: .* is not a model name", {"models": SECRET}),
        ("models: entry 2 of the list is not a model name; .* as %2C", {"models": f"resnet18={CUT_BY_COMMA}"}),
        ("models: .* has no initial weights", {"models": f"logistic_regression={SECRET}"}),
        (
            "models: two models would be called 'resnet18_h'",
            {"models": ",".join(["resnet18=https://us3r:passw0rd@h"] * 2)},
        ),
    ],
)
def test_no_message_shows_what_is_secret_in_an_address(message: str, form: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"^{message}") as refused:
        resolved(**form)
    assert not any(secret in str(refused.value) for secret in ("us3r", "pass", "w0rd", "s1gnature"))


def test_an_emptied_text_field_means_the_recipes_choice() -> None:
    assert resolved(models=" ", data_uri="") == resolved()


def test_a_pasted_address_may_have_spaces_around_it() -> None:
    """With one before it, it would be taken for a path, which messages show whole."""
    assert resolved(dataset="images", data_uri=" https://h/a.zip\n").data.uri == "https://h/a.zip"


def test_one_architecture_with_two_weights_has_two_names() -> None:
    config = resolved(models="resnet18=imagenet, resnet18=random, custom_cnn")
    assert [(model.name, model.weights) for model in config.models] == [
        ("resnet18_imagenet", "imagenet"),
        ("resnet18_random", "random"),
        ("custom_cnn", "random"),
    ]


def test_weights_may_be_a_uri_with_an_equals_sign() -> None:
    [(_, architecture, weights)] = parse_models("resnet18=https://h/w.pth?a=b#sha256=00", "random")
    assert (architecture.name, weights) == ("resnet18", "https://h/w.pth?a=b#sha256=00")


def test_a_name_that_no_model_has_is_refused_before_the_run_begins() -> None:
    with pytest.raises(UserError, match="models: 'resnet99' is unknown; did you mean resnet"):
        resolved(models="custom_cnn,resnet99")


def test_the_report_recipe_has_the_reports_settings() -> None:
    config = resolved(recipe="report", dataset="cifar10")
    assert [(model.name, model.weights) for model in config.models] == [
        ("custom_cnn", "random"),
        ("logistic_regression", "none"),
        ("resnet18", "imagenet"),
    ]
    for model in (config.models[0], config.models[2]):
        assert (model.train.optimizer, model.train.learning_rate, model.train.num_epochs) == ("adam", 1e-3, 10)
    assert config.data.image_size == 32


def test_what_the_user_chose_goes_over_the_recipe() -> None:
    train = resolved(recipe="report", epochs=3, learning_rate=1, batch_size=8, seed=5).models[0].train
    assert (train.num_epochs, train.learning_rate, train.batch_size, train.seed) == (3, 1.0, 8, 5)


def test_devices_need_two_images_of_a_batch_each() -> None:
    assert resolved(devices=4, batch_size=8).models[0].train.num_devices == 4
    with pytest.raises(UserError, match=r"^devices: 5 is not allowed with batches of 8 .*; give at most 4, or"):
        resolved(devices=5, batch_size=8)


def test_devices_do_not_matter_to_linear_models() -> None:
    assert resolved(models="logistic_regression", devices=5, batch_size=8).models


def test_every_recipe_resolves() -> None:
    for recipe in RECIPES:
        assert resolved(recipe=recipe).models


def test_importing_the_configuration_loads_nothing_heavy() -> None:
    script = (
        "import sys, mlpipe.config, mlpipe.recipes\n"
        "heavy = {'airflow', 'torch', 'sklearn', 'mlflow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_strong_recipe_takes_networks_for_small_images_only_for_small_images_and_random_weights() -> None:
    def chosen(**values: object) -> list[tuple[str, int | None]]:
        form = {"recipe": "strong", "dataset": "cifar10", "models": "resnet18,efficientnet_b0,resnet18=imagenet"}
        return [(model.variant, model.input_size) for model in resolved(**{**form, **values}).models]

    assert chosen() == [("small_images", None), ("standard", None), ("standard", 128)]
    assert chosen(image_size=224) == [("standard", None)] * 3
    random, _, pretrained = (model.train for model in resolved(
        recipe="strong", dataset="cifar10", models="resnet18,custom_cnn,resnet18=imagenet"
    ).models)  # fmt: skip
    assert (pretrained.optimizer, pretrained.learning_rate) == ("sgd", 0.01)
    assert (random.optimizer, random.learning_rate, random.progressive_resizing) == ("muon", 0.07, True)


def test_the_quick_recipe_tunes_pretrained_networks_by_adam_on_whole_images() -> None:
    random, pretrained = (model.train for model in resolved(models="custom_cnn,custom_cnn=models:/a/1").models)
    assert (random.optimizer, random.progressive_resizing) == ("muon", True)
    assert (pretrained.optimizer, pretrained.learning_rate, pretrained.progressive_resizing) == ("adam", 3e-3, False)


def test_digits_are_never_mirrored() -> None:
    for model in resolved(recipe="strong", dataset="digits").models:
        if isinstance(model.train, NetworkSettings):
            assert (model.train.augmentation, model.train.test_time_averaging) == ("crop", "none")
        else:
            assert model.train.augmentation == "none"


def test_a_recipe_with_an_unknown_optimizer_is_refused_before_anything_is_triggered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick = RECIPES["quick"]
    monkeypatch.setitem(RECIPES, "quick", replace(quick, network=replace(quick.network, optimizer="sdg")))
    with pytest.raises(ValueError, match="optimizer: 'sdg' is unknown; known are adam, muon, normalized_muon, sgd"):
        resolved(models="resnet18")


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="optimizer: 'sdg' is unknown"):
        resolved(models="resnet18", settings='{"optimizer": "sdg"}')
    with pytest.raises(UserError, match="not allowed with mixing"):
        resolved(models="resnet18", settings='{"mixing": "cutmix"}', teacher="models:/pets-classifier/3")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"models": "resnet18", "settings": '{"width": 2}'}, "width: 2 is not allowed for resnet18"),
        ({"models": "custom_cnn", "settings": '{"width": -1}'}, "settings: width: -1 is not allowed"),
        ({"models": "resnet18", "settings": '{"depth": 2}'}, "depth: 2 is not allowed for resnet18"),
        ({"models": "custom_cnn", "settings": '{"depth": 0}'}, "settings: depth: 0 is not allowed"),
        ({"models": "custom_cnn", "settings": '{"num_epochs": 0}'}, "settings: num_epochs: 0 is not allowed"),
        (
            {"models": "custom_cnn", "settings": '{"early_stopping_patience": 0}'},
            "settings: early_stopping_patience: 0 is not allowed; give 1 to",
        ),
        ({"models": "custom_cnn", "settings": '{"learning_rate": Infinity}'}, "settings: learning_rate: inf is not"),
        ({"models": "custom_cnn", "settings": "[" * 3000}, "settings: '[[["),
        ({"models": "custom_cnn", "settings": '{"label_smoothing": 2}'}, "settings: label_smoothing: 2 is not"),
        ({"models": "logistic_regression", "settings": '{"inverse_regularization": -1}'}, "settings: inverse_reg"),
        (
            {"models": "custom_cnn,logistic_regression", "settings": '{"augmentation": "crop"}'},
            "settings: augmentation: 'crop' is not allowed for logistic_regression; give 'none' or 'flip'",
        ),
        ({"models": "custom_cnn", "settings": '{"seed": 5}'}, "settings: seed has a field of its own, seed"),
        ({"models": "custom_cnn", "settings": '{"num_devices": 2}'}, "settings: num_devices has a field of its own"),
        ({"models": "custom_cnn", "settings": '{"num_components": 9}'}, "settings: no model of this run has num_comp"),
        ({"models": "custom_cnn", "fine_tuning": "head"}, "fine_tuning: head is for pretrained networks, and none"),
        ({"models": "logistic_regression", "teacher": "models:/a/1"}, "teacher: no model of this run learns from one"),
        ({"models": "custom_cnn", "teacher": "models:/a/1,models:/a/2"}, "teacher: 2 models are given; give one"),
        ({"find_learning_rate": True, "learning_rate": 0.1}, "find_learning_rate: learning_rate is 0.1"),
        ({"find_batch_size": True, "batch_size": 64}, "find_batch_size: batch_size is 64"),
    ],
)
def test_what_cannot_be_found_or_widened_is_refused(form: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        resolved(**form)


def test_every_setting_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    known = {each.name for kind in (NetworkSettings, LinearSettings) for each in fields(kind)} - OF_THE_FORM.keys()
    assert not [name for name in known if f"`{name}`" not in page]


def test_the_form_says_what_its_empty_fields_mean() -> None:
    said = {name: schema["description"] for name, schema in RunParams.json_schema().items()}
    for recipe in RECIPES.values():
        networks = [recipe.network, *(replace(recipe.network, **own) for own in recipe.overrides.values())]
        networks.append(replace(recipe.network, **recipe.pretrained))
        for network in networks:
            assert str(network.num_epochs) in said["epochs"]
            assert str(network.batch_size) in said["batch_size"]
            assert f"{network.learning_rate:g}" in said["learning_rate"]
            assert network.early_stopping_patience is None
