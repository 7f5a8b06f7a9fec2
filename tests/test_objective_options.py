"""What each objective makes of the options: its defaults, and what it refuses with a sentence."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttht import config_file
from fasttht.build import build_clean_encoder, build_model
from fasttht.config import TrainConfig
from fasttht.errors import CheckpointError, UsageError
from fasttht.models.denoise import has_denoising
from fasttht.resolve import resolve
from fasttht.traits import TRAITS

pytestmark = pytest.mark.changes_rng  # networks are initialised from the global generator


def resolved(objective: str, **options: Any) -> TrainConfig:
    config = TrainConfig()
    for name, value in {"objective": objective, **options}.items():
        section = next(s for s in vars(config).values() if hasattr(s, name))
        setattr(section, name, value)
    return resolve(config)


COSINE = {"that", "that-no-cl", "clean-con"}
WITH_ENCODER = {"that", "that-no-nce", "clean-con"}


@pytest.mark.parametrize("name", TRAITS)
def test_defaults_are_those_of_the_paper_or_of_the_method(name: str) -> None:
    config = resolved(name, eps=0.1)
    attack = config.attack
    assert config.method.objective == name
    assert config.model.classifier == ("cosine" if name in COSINE else "linear")
    assert config.method.clean_encoder == ("momentum" if name in WITH_ENCODER else None)
    assert attack.alpha == pytest.approx(0.125 if name == "fast" else 0.025)
    assert attack.steps == (1 if name == "fast" else 10)
    assert attack.targeted == (name not in ("fast", "trades"))
    assert attack.start_clean_prob == (0.0 if name in ("fast", "trades") else 0.2)
    assert config.method.num_negatives is None
    assert (config.method.trades_beta, config.method.lambda_kl, config.method.lambda_alp) == (6.0, 1.0, 0.5)
    assert config.method.ce_on == "adv"
    # What was resolved resolves to itself, also by way of the file in the run folder.
    assert resolve(config) == config
    written = tomllib.loads(config_file.to_toml(config))
    assert resolve(config_file.from_flat(written, where="test")) == config


@pytest.mark.parametrize(
    ("name", "expected"), [("that", "at"), ("that-no-nce", "at"), ("clean-con", "clean"), ("at", "at")]
)
def test_a_bank_of_size_zero_leaves_the_contrastive_loss_and_g_out(name: str, expected: str) -> None:
    config = resolved(name, bank_size=0)
    assert config.method.objective == expected
    assert config.method.clean_encoder is None
    assert config.model.classifier == "linear"
    assert resolved(name, bank_size=0, negatives="batch").method.objective == name  # its negatives are the batch's


def test_a_dataset_bank_draws_4096_negatives_by_default() -> None:
    assert resolved("that", bank_kind="dataset").method.num_negatives == 4096
    assert resolved("that", bank_kind="dataset", num_negatives=7).method.num_negatives == 7


REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("clean", {"replay": 4}, ("--objective clean", "--replay 4", "no attack")),
    ("clean-con", {"replay": 4}, ("--objective clean-con", "no attack")),
    ("trades", {"replay": 4}, ("--objective trades", "nothing but the KL")),
    ("fast", {"replay": 4}, ("--objective fast", "one step")),
    ("at-kl", {"replay": 4, "ce_on": "clean"}, ("--ce-on", "adv or both", "classification loss")),
    ("that-no-nce", {"classifier": "cosine"}, ("--classifier", "linear", "--objective that")),
    ("that-no-cl", {"classifier": "linear"}, ("--classifier", "cosine", "--objective at")),
    ("fast", {"steps": 7}, ("--steps", "expected 1", "got 7", "--objective at")),
    ("fast", {"steps": 0}, ("--steps", "got 0")),
    ("trades", {"targeted": True}, ("--targeted", "no target class")),
    ("trades", {"attack_start": "lattice", "eps": 4 / 255}, ("--attack-start", "lattice")),
    ("trades", {"attack_bn": "batch"}, ("--attack-bn", "evaluation mode")),
    ("trades", {"start_clean_prob": 0.2}, ("--start-clean-prob", "0.2", "no gradient")),
    ("at", {"denoise": True, "attack_engine": "folded"}, ("--attack-engine", "eager", "folded")),
    ("that", {"num_negatives": 5}, ("--num-negatives", "--bank-kind dataset", "--bank-size")),
    ("that", {"bank_kind": "dataset", "negatives": "batch"}, ("--bank-kind", "batch")),
    ("that", {"bank_kind": "dataset", "num_negatives": 0}, ("--num-negatives", "at least 1")),
    ("trades", {"trades_beta": -1.0}, ("--trades-beta", "at least 0")),
    ("at-kl", {"lambda_kl": float("nan")}, ("--lambda-kl", "expected a finite number, got nan")),
    ("alp", {"lambda_alp": -0.5}, ("--lambda-alp", "at least 0")),
    ("at", {"start_clean_prob": 1.5}, ("--start-clean-prob", "[0, 1]")),
    ("clean-con", {"data": Path("folder")}, ("--clean-encoder", "momentum")),
]


@pytest.mark.parametrize(("name", "options", "fragments"), REFUSED, ids=lambda value: str(value))
def test_contradictions_are_refused_with_a_sentence(
    name: str, options: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        resolved(name, **options)
    text = str(caught.value)
    for fragment in ("expected", "got", *fragments):
        assert fragment in text, text
    assert "\n" not in text


@pytest.mark.parametrize("name", [name for name, traits in TRAITS.items() if not traits.no_replay])
def test_the_others_may_be_replayed(name: str) -> None:
    config = resolved(name, replay=4)
    assert config.method.objective == name
    assert (config.attack.steps, config.attack.targeted) == (None, False)
    assert config.attack.alpha == config.attack.eps == 4 / 255


def test_weights_of_a_plain_encoder_serve_beside_a_denoising_f(tmp_path: Path) -> None:
    """g then has no such blocks; weights of a denoising one are taken whole, and half of one is refused."""
    from safetensors.torch import save_file

    device, path = torch.device("cpu"), tmp_path / "g.safetensors"
    small = {"arch": "resnet18", "stem": "small", "width": 4, "feat_dim": 6, "clean_encoder": str(path)}
    plain, denoising = (build_model(resolved("that", **small, denoise=d), 5, device) for d in (False, True))
    config = resolved("that", **small, denoise=True)
    for source, expected in ((plain, False), (denoising, True)):
        save_file({k: v.contiguous() for k, v in source.state_dict().items()}, path)
        encoder = build_clean_encoder(config, denoising)
        assert encoder is not None
        assert has_denoising(encoder) == expected
        own = encoder.state_dict()
        assert own.keys() == {name for name in source.state_dict() if not name.startswith("classifier")}
        assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in own.items())
    assert has_denoising(denoising)
    torn = {k: v.contiguous() for k, v in denoising.state_dict().items() if "layer3.2.phi" not in k}
    save_file(torn, path)
    with pytest.raises(CheckpointError, match=r"layer3\.2\.phi"):
        build_clean_encoder(config, denoising)
