"""Bits, Layers and Recipe: what is accepted, what comes back from YAML, and the words of every refusal."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dqbart.methods import BOTH, METHODS, OF_ENCODER_DECODERS
from dqbart.notation import Bits, Layers
from dqbart.recipe import PAPER_LOSSES, PRESETS, LossWeights, Recipe, read_yaml


@pytest.mark.parametrize("text", ["2-2-8", "1-4-32", "32-32-32", "8-3-8"])
def test_bits_notation(text: str) -> None:
    bits = Bits(text)
    assert [bits.weights, bits.embeddings, bits.activations] == [int(n) for n in text.split("-")]
    assert str(bits) == text and bits.quantized == (text != "32-32-32")
    assert eval(repr(bits)) == bits and hash(bits) == hash(Bits(text))


def test_bits_are_normal_and_frozen() -> None:
    assert Bits("02-2-08") == Bits("2-2-8") and str(Bits("02-2-08")) == "2-2-8"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Bits("2-2-8").weights = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2-2",
        "2-2-8-8",
        "2-2-4",
        "5-2-8",
        "2-16-8",
        " 2-2-8",
        "2-2-8\n",
        "a-b-c",
        "-2-2-8",
        "2.0-2-8",
        228,
        None,
        (2,),
    ],
)
def test_wrong_bits(text: Any) -> None:
    with pytest.raises(ValueError) as error:
        Bits(text)
    message = str(error.value)
    assert message.startswith(f"bits {text!r}: expected W-E-A, such as 2-2-8") and "(1, 2, 3, 4, 8, 32)" in message
    assert "\n" not in message


@given(st.text(max_size=8))
def test_any_text_is_bits_or_refused(text: str) -> None:
    for kind in (Bits, Layers):
        try:
            value = kind(text)
        except ValueError:
            continue
        assert kind(value.text) == value


def test_layers_notation() -> None:
    assert (Layers("6-3").encoder, Layers("6-3").decoder) == (6, 3)
    assert (Layers("6").encoder, Layers("6").decoder) == (6, None)
    assert Layers("06-3") == Layers("6-3")


@pytest.mark.parametrize("text", ["", "0-3", "6-0", "0", "6-3-1", "-6", "6-", "x", None, 6.0, True])
def test_wrong_layers(text: Any) -> None:
    with pytest.raises(ValueError, match="expected E-D, such as 6-3, or one number for an encoder; at least 1 each"):
        Layers(text)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_survive_yaml(name: str, tmp_path: Path) -> None:
    recipe = Recipe.preset(name, layers="6-3", skip=["*.fc2"], generation={"num_beams": 4}, target_lang="ö")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    again = Recipe.from_yaml(file)
    assert again == recipe and again.to_yaml() == recipe.to_yaml()
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.preset(name) == Recipe.from_dict(yaml.safe_load(Recipe.preset(name).to_yaml()))


def test_the_default_recipe_is_the_small_preset() -> None:
    assert Recipe() == Recipe.preset("small")


def test_paper_presets_are_the_papers() -> None:
    recipe = Recipe.preset("paper-2-2-8")
    assert (recipe.bits.text, recipe.numerics, recipe.probability_bits) == ("2-2-8", "paper", 8)
    assert (recipe.losses, recipe.logits_loss, recipe.temperature) == (PAPER_LOSSES, "mse", 1)
    assert (recipe.learning_rate, recipe.epochs, recipe.warmup_ratio, recipe.seed) == (3e-5, 20, 0.05, 28)
    assert recipe.batch_size * recipe.gradient_accumulation == 128 and recipe.max_grad_norm == 0
    assert PAPER_LOSSES.used() == dict.fromkeys((*BOTH, *OF_ENCODER_DECODERS), 1.0)


def test_a_recipe_is_frozen_and_to_dict_is_a_copy() -> None:
    recipe = Recipe(generation={"num_beams": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.epochs = 4  # type: ignore[misc]
    recipe.to_dict()["generation"]["num_beams"] = 9
    recipe.to_dict()["losses"]["task"] = 9
    assert recipe.generation == {"num_beams": 2} and recipe.losses.task == 0.2


def test_yaml_numbers_written_as_text(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("learning_rate: 3e-5\nweight_decay: 1e-2\nlosses: {task: 5e-1}\nlayers: 6\nbits: 2-2-8\n")
    assert isinstance(read_yaml(file)["learning_rate"], str)  # YAML 1.1
    recipe = Recipe.from_yaml(file)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.losses.task) == (3e-5, 0.01, 0.5)
    assert recipe.layers == Layers("6")


def test_a_preset_key_in_a_file_is_the_base(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("preset: paper-8-8-8\nepochs: 1\n")
    assert Recipe.from_yaml(file) == Recipe.preset("paper-8-8-8", epochs=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected 'key: value' lines, found NoneType"),
        ("- a\n- b\n", "expected 'key: value' lines, found list"),
        ("bits: [2\n", "not valid YAML"),
        ("bits: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("bits: 2-2-9\n", "bits '2-2-9'"),
        ("epoch: 3\n", "recipe key epoch: did you mean 'epochs'? allowed: bits, layers,"),
        ("losses: {taks: 1}\n", "recipe key losses.taks: did you mean 'task'? allowed: task, logits,"),
        ("3: 3\n", "recipe key 3: "),
        ("zzz: 3\n", "recipe key zzz: allowed: bits"),
        ("preset: papper-2-2-8\n", "preset 'papper-2-2-8': did you mean 'paper-2-2-8'? expected one of small"),
        ("preset: 5\n", "preset 5: expected one of small"),
        ("preset: [a]\n", "preset ['a']: "),
    ],
)
def test_wrong_files(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        Recipe.from_yaml(file)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.yaml: no such recipe file"):
        Recipe.from_yaml(tmp_path / "nowhere.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00bits")
    with pytest.raises(ValueError, match="b.yaml: not valid YAML"):
        Recipe.from_yaml(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bits": 2.0}, "bits 2.0: expected Bits, found float"),
        ({"bits": None}, "bits None: expected Bits, found NoneType"),
        ({"layers": [6, 3]}, "layers [6, 3]: expected Layers or null, found list"),
        ({"numerics": "int"}, "numerics 'int': expected one of 'integer', 'paper'"),
        ({"probability_bits": 4}, "probability_bits 4: expected one of 8, 16"),
        ({"storage": "zip"}, "storage 'zip': expected one of 'planar32', 'trits'"),
        ({"epochs": "three"}, "epochs 'three': expected a number"),
        ({"epochs": -1}, "epochs -1: expected at least 0"),
        ({"epochs": float("nan")}, "epochs nan: expected a finite number"),
        ({"epochs": "inf"}, "epochs inf: expected a finite number"),
        ({"epochs": None}, "epochs None: expected float, found NoneType"),
        ({"learning_rate": 0}, "learning_rate 0: expected above 0"),
        ({"learning_rate": float("inf")}, "learning_rate inf: expected a finite number"),
        ({"learning_rate": True}, "learning_rate True: expected float or null, found bool"),
        ({"temperature": 0}, "temperature 0: expected above 0"),
        ({"warmup_ratio": 1}, "warmup_ratio 1: expected from 0 to below 1"),
        ({"dropout": 1}, "dropout 1: expected from 0 to below 1"),
        ({"dropout": "no"}, "dropout 'no': expected a number"),
        ({"label_smoothing": -0.1}, "label_smoothing -0.1: expected from 0 to below 1"),
        ({"batch_size": 0}, "batch_size 0: expected at least 1"),
        ({"batch_size": 1.5}, "batch_size 1.5: expected int, found float"),
        ({"batch_size": True}, "batch_size True: expected int, found bool"),
        ({"gradient_accumulation": 0}, "gradient_accumulation 0: expected at least 1"),
        ({"max_source_length": 1}, "max_source_length 1: expected at least 2"),
        ({"seed": -1}, "seed -1: expected from 0 to 4294967295"),
        ({"seed": 2**32}, "seed 4294967296: expected from 0 to 4294967295"),
        ({"bf16": "yes"}, "bf16 'yes': expected bool, found str"),
        ({"source_column": 3}, "source_column 3: expected str or null, found int"),
        ({"skip": None}, "skip None: expected a list of module name patterns"),
        ({"skip": [3]}, "skip [3]: expected a list of module name patterns"),
        ({"generation": [1]}, "generation [1]: expected dict, found list"),
        ({"losses": {"task": -1}}, "losses.task -1: expected a number of at least 0"),
        ({"losses": {"task": True}}, "losses.task True: expected a number of at least 0"),
        ({"losses": {"task": "much"}}, "losses.task 'much': expected a number"),
        ({"losses": {"task": 0, "logits": 0}}, "losses: all weights are 0"),
        ({"losses": 3}, "losses 3: expected LossWeights, found int"),
        ({"method": "tinybret"}, "method 'tinybret': did you mean 'tinybert'? expected one of dq,"),
        ({"method": None}, "method None: expected one of dq,"),
        ({"task": "classify"}, "task 'classify': did you mean 'classification'? expected one of seq2seq,"),
        ({"metric": "rogue"}, "metric 'rogue': expected one of accuracy,"),
        ({"metric": "rouge", "task": "regression"}, "metric 'rouge' of task 'regression': expected one of spearman"),
        ({"layer_map": [0, True]}, "layer_map [0, True]: expected teacher layers"),
        ({"hidden_size": 0}, "hidden_size 0: expected at least 1"),
        ({"prediction_epochs": -1}, "prediction_epochs -1: expected at least 0"),
        ({"bits": "8-4-8", "storage": "trits"}, "storage 'trits' with bits 8-4-8: only 2-bit (ternary) weights"),
        ({"bits": "2-2-32", "probability_bits": 8}, "probability_bits 8 with bits 2-2-32: needs 8-bit activations"),
        ({"numerics": "paper", "logits_loss": "mse", "bits": "4-4-8"}, "numerics 'paper' with bits 4-4-8: the paper"),
        ({"numerics": "paper", "logits_loss": "mse", "bits": "8-2-8"}, "numerics 'paper' with bits 8-2-8: the paper"),
        ({"numerics": "paper"}, "logits_loss 'kl', temperature 1 with numerics 'paper'"),
        ({"numerics": "paper", "logits_loss": "mse", "temperature": 2}, "logits_loss 'mse', temperature 2 with"),
    ],
)  # fmt: skip
def test_wrong_values(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        Recipe.from_dict(values)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_fills_in_what_the_user_leaves_out(name: str, tmp_path: Path) -> None:
    recipe, method = Recipe(method=name), METHODS[name]
    assert recipe.losses == method.losses and recipe.terms == method.losses.used()
    assert all(getattr(recipe, key) == value for key, value in method.settings.items())
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    changed = Recipe(method=name, losses={"hidden": 7}, temperature=3, layer_map="top")
    assert changed.terms == method.losses.used() | {"hidden": 7}
    assert (changed.temperature, changed.layer_map) == (3, "top")


def test_tinybert_has_two_stages_on_a_task() -> None:
    recipe = Recipe(method="tinybert", task="classification", epochs=10, prediction_epochs=2, max_steps=9)
    first, second = recipe.stages()
    assert first == recipe and set(first.terms) == {"embedding", "hidden", "scores"}
    assert (second.terms, second.epochs, second.max_steps) == ({"logits": 1.0}, 2, 9)
    number = Recipe(method="tinybert", task="regression").stages()[1]
    assert number.terms == {"task": 1.0}  # as released: the labels
    assert len(Recipe(method="tinybert", task="text").stages()) == 1  # the general stage
    assert len(Recipe(method="tinybert", task="classification", prediction_epochs=0).stages()) == 1
    assert len(Recipe(method="dq", task="classification").stages()) == 1


def test_losses_that_were_asked_for_are_those_of_all_stages() -> None:
    width, depth = Recipe(method="dynabert").stages()
    assert (width.terms, depth.terms) == ({"logits": 1.0, "hidden": 0.1}, {"logits": 1.0, "hidden": 1.0})
    own = Recipe(method="dynabert", losses={"task": 1, "hidden": 0}, label_epochs=1).stages()
    assert [stage.terms for stage in own] == [{"task": 1.0, "logits": 1.0}] * 2 + [{"task": 1.0}]


def test_one_loss_of_a_preset_leaves_the_others() -> None:
    paper = Recipe.preset("paper-2-2-8")
    changed = Recipe.from_dict({"preset": "paper-2-2-8", "losses": {"task": 0.8}})
    assert changed.terms == paper.terms | {"task": 0.8} and len(changed.terms) == 7


def test_combinations_that_are_right() -> None:
    assert Recipe(bits="2-4-8", storage="trits").storage == "trits"
    assert Recipe(bits="4-2-8", storage="trits").bits == Bits("4-2-8")
    assert Recipe(bits="8-8-8", probability_bits=8).probability_bits == 8
    assert Recipe(numerics="paper", logits_loss="mse", bits="32-32-32").bits.quantized is False
    assert Recipe(skip="*.fc1").skip == ("*.fc1",)
    assert Recipe(losses={"task": 1}).losses == LossWeights(task=1)
    with pytest.raises(TypeError):
        Recipe("2-2-8")  # type: ignore[misc]
