"""Every preset resolves and builds at its full size, trains when shrunk, and says what it is and who measured it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasttht.attacks.pgd import Draw
from fasttht.build import build_model, build_schedule, progressive_size
from fasttht.config import TrainConfig
from fasttht.config_file import QUICKSTART, from_flat, identity, preset_names, read_preset
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.models.ghost_bn import group_size_of
from fasttht.pipelines.loader import Batch
from fasttht.resolve import resolve
from fasttht.schedule import Schedule
from fasttht.state import TrainState
from fasttht.steps import free_step, standard_step
from fasttht.traits import TRAITS

FOLDER = Path(__file__).parents[1] / "fasttht" / "presets"
IMAGENET = [name for name in preset_names() if name != QUICKSTART]

# Clean, PGD-10, ... top-1 as the paper prints them: Tables 1, 2, 5, 6 and 7.
PAPER: dict[str, tuple[str, ...]] = {
    "at-r50-pgd10": ("50.81", "47.78", "39.31", "38.09", "37.74"),
    "that-r50-pgd10": ("53.29", "49.62", "41.01", "40.22", "39.59"),
    "at-r101-pgd10": ("56.21", "51.40", "42.68", "41.08", "40.86"),
    "that-r101-pgd10": ("58.17", "52.70", "44.02", "42.79", "42.34"),
    "at-r152-pgd10": ("57.61", "52.13", "43.86", "42.73", "42.14"),
    "that-r152-pgd10": ("60.38", "54.69", "45.67", "44.51", "44.22"),
    "at-r50-free": ("60.21", "32.77", "31.82"),
    "that-r50-free": ("63.01", "34.25", "33.26"),
    "at-r101-free": ("63.34", "35.38", "34.32"),
    "that-r101-free": ("67.22", "38.56", "37.17"),
    "at-r152-free": ("64.45", "36.99", "35.99"),
    "that-r152-free": ("68.82", "39.83", "38.27"),
    "at-kl-r152-pgd10": ("71.05", "14.13", "0.00"),
    "that-no-cl-r152-pgd10": ("58.92", "53.32", "42.78"),
    "that-no-nce-r152-pgd10": ("59.64", "53.80", "42.77"),
    "that-r152-bank0": ("57.61", "43.86", "42.14"),
    "that-r152-bank4096": ("59.77", "45.40", "43.15"),
    "that-r152-bank8192": ("58.25", "45.89", "43.79"),
    "that-r152-bank16384": ("60.26", "45.71", "43.59"),
    "that-r152-bank32768": ("60.38", "45.67", "44.22"),
    "that-r152-bank65536": ("60.68", "45.69", "43.43"),
    "that-r152-moco": ("57.76", "53.36", "43.03"),
}
FIGURE_4 = ("alp-r152-pgd10", "denoise-r152-pgd10", "mbn-alp-r152-pgd10")


def resolved(name: str, **options: Any) -> TrainConfig:
    return resolve(from_flat({**read_preset(name), **options}, where=name))


@pytest.mark.parametrize("name", IMAGENET)
def test_the_header_says_command_hardware_numbers_and_whether_they_were_measured(name: str) -> None:
    header = (FOLDER / f"{name}.toml").read_text().split("\narch =")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    first = f"#   fasttht train --preset {name} --data "
    command = header.splitlines()[1]
    assert command.startswith(first)
    traits = TRAITS[resolved(name).method.objective]
    momentum = read_preset(name).get("clean_encoder") == "momentum"
    assert ("--clean-encoder" in command) == (traits.has_clean_encoder and not momentum)
    text = " ".join(line.removeprefix("# ") for line in header.splitlines())
    assert re.search(r"V100|hardware", text)
    assert "Ours: not measured" in text
    for number in PAPER.get(name, ()):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", text), number


def test_every_trained_row_of_the_papers_tables_has_a_preset() -> None:
    assert set(PAPER) | set(FIGURE_4) <= set(IMAGENET)


def changed(a: str, b: str) -> set[str]:
    """The options in which two resolved presets differ."""
    one, two = (identity(resolved(name)) for name in (a, b))
    return {key for key in one if one[key] != two[key]}


def test_rows_that_are_the_same_network_are_the_same_run() -> None:
    assert changed("that-r152-bank32768", "that-r152-pgd10") == set()
    assert changed("that-r152-bank0", "at-r152-pgd10") == {"bank_size"}
    assert changed("that-r152-bank4096", "that-r152-bank65536") == {"bank_size"}
    assert changed("that-r152-moco", "that-r152-pgd10") <= {"clean_encoder"}
    assert changed("at-r50-eps4-robustbench", "that-r50-eps4-robustbench") == {
        "objective", "classifier", "clean_encoder",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in IMAGENET if "r152" in name or name.endswith("pgd10")])
def test_standard_training_has_the_colours_of_its_reference_recipe_and_free_training_has_none(name: str) -> None:
    data = resolved(name).data
    assert (data.jitter, data.lighting) == ((0.0, 0.0) if name.endswith("free") else (0.4, 0.1))


def test_frees_own_recipe_is_that_of_its_authors() -> None:
    """Their configs.yml and main_free.py: the rate drops after ceil(30/4) = 8 and 16 of 23 passes."""
    config = resolved("free-original")
    schedule = build_schedule(config, steps_per_pass=10)
    rates = [float(schedule.at(torch.tensor(done * 40))) for done in (0, 7, 8, 15, 16, 22)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    optim = config.optim
    assert (optim.nesterov, optim.smoothing, optim.decay_all, optim.drop_last) == (False, 0.0, True, False)
    assert (config.attack.eps, config.attack.alpha, config.attack.replay) == (4 / 255, 4 / 255, 4)


def network_of(name: str) -> tuple[Any, ...]:
    """What the network of a preset depends on."""
    config, traits = resolved(name), TRAITS[resolved(name).method.objective]
    return *vars(config.model).values(), traits.has_feature_head, traits.mixture_bn


NETWORKS = list({network_of(name): name for name in IMAGENET}.values())


@pytest.mark.changes_rng
@pytest.mark.parametrize("name", NETWORKS)
def test_its_network_builds_at_full_size(name: str) -> None:
    """One preset for each network. On the meta device, so that shapes are computed and numbers are not."""
    config = resolved(name)
    with torch.device("meta"):
        model = build_model(config, 1000, torch.device("meta"))
        features = model.trunk(torch.empty(2, 3, 224, 224))
    assert features.shape == (2, model.trunk.num_features) == (2, 2048)
    assert model.classifier.weight.shape == (1000, 2048)
    assert (model.feature_head is not None) == TRAITS[config.method.objective].has_feature_head
    assert group_size_of(model) == config.model.bn_group_size


def test_the_one_that_grows_its_images_ends_at_the_full_size() -> None:
    growing = {name for name in IMAGENET if progressive_size(resolved(name)) is not None}
    assert growing == {"fast-r50"}
    size = progressive_size(resolved("fast-r50"))
    assert size is not None
    assert [size(epoch) for epoch in (0, 2, 6, 10, 14)] == [128, 128, 192, 224, 224]


def made_small(name: str) -> TrainConfig:
    """A preset with a small network and small batches; everything else is its own."""
    options = read_preset(name)
    small: dict[str, Any] = {
        "arch": "resnet18", "stem": "small", "width": 4, "img_size": 8, "batch_size": 6, "lr": 0.05,
        "progressive_size": 0, "progressive_epochs": None, "clean_encoder": "momentum",
        "bank_size": min(options.get("bank_size", 8), 8), "bn_group_size": min(options.get("bn_group_size", 0), 2),
    }  # fmt: skip
    return resolved(name, **small)


SMALL = list({str(identity(made_small(name))): name for name in IMAGENET}.values())


@pytest.mark.changes_rng
@pytest.mark.parametrize("name", SMALL)
def test_it_trains_when_it_is_made_small(name: str) -> None:
    """One preset of those that are then the same. A step changes the weights and stays finite."""
    config = made_small(name)
    model = build_model(config, 4, torch.device("cpu"))
    encoder = CleanEncoder(model, frozen=False) if TRAITS[config.method.objective].has_clean_encoder else None
    state = TrainState(config, model, encoder, Schedule(0.05, milestones=[]), img_size=8, num_images=12)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    batch = Batch(x, torch.arange(6) % 4, torch.arange(6))
    if config.attack.replay > 1:
        free_step(state, config, batch, Draw(0))
    else:
        standard_step(state, config, batch, Draw(0), num_classes=4)
    sums = state.meter.read()
    assert sums["skipped"] == 0
    assert np.isfinite(sums["loss"])
    assert sums["images"] == 6 * config.attack.replay
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
