"""The benchmark's images: the same bytes everywhere, what they are said to be, and nothing from the network."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from fasttht.pipelines import photographs as module
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.decode_turbo import decode_rgb
from fasttht.pipelines.photographs import HEIGHT, WIDTH, photographs

NUM = 16

needs_sources = pytest.mark.skipif(not module._find(), reason="needs scikit-learn's or scikit-image's photographs")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the network was asked for")


@needs_sources
def test_the_same_bytes_twice_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", refuse)
    found = []
    for cache in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        found.append(photographs(NUM))
    first, second = (one.beton for one in found)
    assert first != second
    assert first.read_bytes() == second.read_bytes()
    assert not found[0].made_up
    assert sorted(path.name for path in first.parent.iterdir()) == ["train.beton", "train.beton.json"]


@needs_sources
def test_every_image_is_a_whole_jpeg_of_imagenets_size() -> None:
    found = photographs(NUM)
    file = BetonFile(found.beton)
    assert len(file) == NUM
    assert file.verified
    assert file.class_names == found.sources
    assert set(file.labels.tolist()) == set(range(len(found.sources)))
    images = []
    for row in range(NUM):
        sample = file.sample(row)
        height, width, colours, subsampling = simplejpeg.decode_jpeg_header(sample.data)
        assert (height, width, colours, subsampling) == (HEIGHT, WIDTH, "YCbCr", "420")
        images.append(decode_rgb(sample))
        assert images[-1].std() > 10
    assert len({image.tobytes() for image in images}) == NUM, "every cut is another one"


@needs_sources
def test_they_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    beton = photographs(NUM).beton
    monkeypatch.setattr(module, "_write_tree", refuse)
    assert photographs(NUM).beton == beton
    with pytest.raises(AssertionError):
        photographs(NUM + 1)


def test_the_folder_says_which_version_and_sources(cache: Path) -> None:
    found = photographs(NUM)
    assert found.beton.parent.parent == cache / "fasttht"
    assert found.beton.parent.name == f"photographs-v1-{NUM}-{'-'.join(found.sources)}"


def test_a_cache_that_cannot_be_written_is_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert photographs(NUM).beton.is_relative_to(tmp_path / "temporary")


def test_without_sources_they_are_made_up_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_find", dict)
    found = photographs(NUM)
    assert found.made_up
    file = BetonFile(found.beton)
    assert all((file.sample(row).height, file.sample(row).width) == (HEIGHT, WIDTH) for row in range(NUM))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "again"))
    assert photographs(NUM).beton.read_bytes() == found.beton.read_bytes()


def test_made_up_images_have_the_spectrum_of_photographs() -> None:
    """Amplitude 1/f: a line of slope -1 in log-log, over the frequencies that clipping and rounding leave alone."""
    light = np.asarray(module._make_up("noise0")).astype(np.float64).mean(axis=2)
    assert np.array_equal(module._make_up("noise0"), module._make_up("noise0"))
    assert not np.array_equal(module._make_up("noise0"), module._make_up("noise1"))
    amplitude = np.abs(np.fft.fft2(light - light.mean()))
    frequency = np.hypot(np.fft.fftfreq(light.shape[0])[:, None], np.fft.fftfreq(light.shape[1])[None, :])
    inner = (frequency > 0.02) & (frequency < 0.3)
    slope = np.polyfit(np.log(frequency[inner]), np.log(amplitude[inner]), 1)[0]
    assert slope == pytest.approx(-1, abs=0.1)


def test_the_packages_that_bring_the_sources_are_not_imported(cache: Path) -> None:
    code = f"""
import sys
from fasttht.pipelines.photographs import photographs
photographs({NUM})
print(*[name for name in ("sklearn", "skimage", "pooch", "requests", "urllib.request") if name in sys.modules])
"""
    # torch brings urllib.request along, so only what it did not bring counts.
    code = "import torch, sys; before = set(sys.modules)" + code.replace(
        "in sys.modules", "in set(sys.modules) - before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
