"""All decoders on one plan: the same rows, labels, windows and flips; pixels as near as each of them states."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from fasttht.pipelines.backends import DECODERS, why_not
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.beton_write import write_beton
from fasttht.pipelines.loader import Batch, Loader
from fasttht.pipelines.plan import Augment, EpochPlan
from fasttht.pipelines.samples import Sample

SIZE = 48
NUM = 24
BATCH = 7

# Largest average difference of one image from the embedded decoder's, of 255, in training and in evaluation.
MEAN = {"turbo": (0.0, 0.0), "dali-cpu": (0.5, 0.25), "ffcv": (6.0, 6.0), "dali-gpu": (3.0, 3.0)}

# dali-gpu's own arithmetic has not been measured: its bounds are loose, a wrong window or colour order is off by more.
OTHERS = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(
                why_not(name, torch.device("cuda")) is not None, reason=f"{name}: package not installed"
            ),
            *([pytest.mark.gpu] if name == "dali-gpu" else []),
        ],
    )
    for name in DECODERS
    if name not in ("turbo", "synthetic")
]


def test_every_decoder_states_its_tolerance() -> None:
    """Made-up pixels have none."""
    assert set(MEAN) == set(DECODERS) - {"synthetic"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> BetonFile:
    """Cuts of photographs, of other sizes and shapes, every fourth one raw."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn's photographs")
    photographs = datasets.load_sample_images().images
    rng = np.random.default_rng(0)
    rows = []
    for row in range(NUM):
        height, width = (int(side) for side in rng.integers(60, 400, 2))
        top, left = int(rng.integers(0, 427 - height)), int(rng.integers(0, 640 - width))
        pixels = np.ascontiguousarray(photographs[row % 2][top : top + height, left : left + width])
        data = pixels.reshape(-1)
        if row % 4:
            data = np.frombuffer(simplejpeg.encode_jpeg(pixels, 90, colorsubsampling="420"), np.uint8)
        rows.append((Sample("jpg" if row % 4 else "raw", data, height, width), row % 10))
    path: Path = tmp_path_factory.mktemp("agree") / "photographs.beton"
    write_beton(path, rows, NUM)
    return BetonFile(path)


def loader_of(file: BetonFile, name: str, augment: Augment | None) -> Loader:
    plan = EpochPlan(num_samples=NUM, batch_size=BATCH, seed=5, augment=augment)
    device = "cuda" if name == "dali-gpu" else "cpu"
    return Loader(file, plan, img_size=SIZE, decoder=name, workers=2, device=device)


def epoch(file: BetonFile, name: str, augment: Augment | None) -> list[Batch]:
    loader = loader_of(file, name, augment)
    batches = list(loader)
    loader.close()
    return [Batch(batch.x.cpu(), batch.y.cpu(), batch.index.cpu()) for batch in batches]


def image_means(found: list[Batch], expected: list[Batch]) -> torch.Tensor:
    """Average difference of every image, (N,)."""
    one, two = (torch.cat([batch.x for batch in batches]).float() for batches in (found, expected))
    return (one - two).abs().mean((1, 2, 3))


@pytest.mark.parametrize("augment", [Augment(), None], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", OTHERS)
def test_one_plan_gives_every_decoder_the_same_epoch(name: str, augment: Augment | None, file: BetonFile) -> None:
    expected, found = epoch(file, "turbo", augment), epoch(file, name, augment)
    assert [batch.index.tolist() for batch in found] == [batch.index.tolist() for batch in expected]
    assert [batch.y.tolist() for batch in found] == [batch.y.tolist() for batch in expected]
    assert [len(batch.index) for batch in found] == [7, 7, 7, 3]
    for one, two in zip(found, expected, strict=True):
        assert one.x.shape == two.x.shape
        assert one.x.stride() == two.x.stride()
        assert one.x.dtype == two.x.dtype
    means = image_means(found, expected)
    assert means.max() <= MEAN[name][augment is None]
    # The same images in another order, or mirrored, are further away than the tolerance.
    mirrored = [Batch(batch.x.flip(3), batch.y, batch.index) for batch in found]
    assert image_means(mirrored, expected).median() > 2 * MEAN[name][augment is None]
    shifted = [Batch(batch.x.roll(1, 0), batch.y, batch.index) for batch in found]
    assert image_means(shifted, expected).median() > 2 * MEAN[name][augment is None]


@pytest.mark.parametrize("name", OTHERS)
def test_a_decoder_equals_itself_whatever_the_workers_and_the_start(name: str, file: BetonFile) -> None:
    whole = epoch(file, name, Augment())
    loader = loader_of(file, name, Augment())
    batches = iter(loader)
    next(batches)
    state: dict[str, Any] = loader.state_dict()
    loader.close()
    del batches
    later = loader_of(file, name, Augment())
    later._workers = 1
    later.load_state_dict(state)
    for one, two in zip(later, whole[1:], strict=True):
        assert torch.equal(one.x.cpu(), two.x)
        assert torch.equal(one.index.cpu(), two.index)
    later.close()
