"""The benchmark's own images: photographs of ImageNet's usual size, cut from the few that other packages bring along.

Decoding time depends on what is in a picture, so noise and drawings measure little. scikit-learn and scikit-image ship
some photographs as files; they are read where they lie, neither package is imported, and nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from fasttht.pipelines.cache import cache_folder
from fasttht.pipelines.datasets import ImageTree
from fasttht.pipelines.split_writer import write_split

NUM_IMAGES = 512
HEIGHT, WIDTH = 375, 500
QUALITY, SUBSAMPLING = 90, "420"

# Part of the cache folder's name: raise it with any change to what is written.
_VERSION = 1

# Package and file of each. No page of text, no microscope: what people photograph.
_FILES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
}

# How much closer than "all that fits" a cut may go; with it every source yields many different pictures.
_CLOSEST = 1.25

_NUM_MADE_UP = 8


@dataclass(frozen=True)
class Photographs:
    """beton: the file. sources: names of the photographs it was cut from. made_up: there were none; it is noise."""

    beton: Path
    sources: tuple[str, ...]
    made_up: bool


def photographs(num_images: int = NUM_IMAGES) -> Photographs:
    """Return the benchmark's file, written to the cache folder the first time.

    JPEG, quality 90, 4:2:0, 500 x 375. The same sources give the same bytes: 49 kB an image with all seven, where
    ImageNet has about 110. Without either package the pictures are noise with the spectrum of photographs (1/f
    amplitude, 106 kB an image): something to decode, not what people have.
    """
    found = _find()
    names = tuple(found) or tuple(f"noise{i}" for i in range(_NUM_MADE_UP))
    folder = cache_folder(f"photographs-v{_VERSION}-{num_images}-{'-'.join(names)}")
    beton = folder / "train.beton"
    if not beton.exists():
        sources = {name: _open(path) for name, path in found.items()} or {name: _make_up(name) for name in names}
        # Runs that start at the same moment each write their own copy and move it in: all copies are equal.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            _write_tree(Path(own, "tree"), sources, num_images)
            write_split(ImageTree(Path(own, "tree")), Path(own, beton.name))
            for path in sorted(Path(own).glob(f"{beton.name}*"), reverse=True):  # the manifest first
                path.replace(folder / path.name)
    return Photographs(beton, names, made_up=not found)


def _find() -> dict[str, Path]:
    """Return the photographs that are on this machine, by name, in the order of their names."""
    found = {}
    for name, (package, inside) in _FILES.items():
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(root, inside)).is_file():
                found[name] = path
    return found


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _make_up(name: str) -> Image.Image:
    """Draw noise whose amplitude falls as 1/f, as that of photographs does; colours vary less than brightness."""
    height, width = 427, 640
    rng = np.random.default_rng(list(name.encode()))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # no mean: it is set below
    phase = np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
    planes = np.fft.irfft2(phase / frequency, s=(height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    light, reddish, bluish = planes * np.array([50.0, 12.0, 12.0])[:, None, None]
    pixels = 118 + np.stack([light + reddish, light - (reddish + bluish) / 2, light + bluish], axis=-1)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _write_tree(root: Path, sources: dict[str, Image.Image], num_images: int) -> None:
    """Write JPEGs as root/<source>/<number>.jpg, the sources in turn."""
    rng = np.random.default_rng(_VERSION)
    for name in sources:
        (root / name).mkdir(parents=True)
    for number in range(num_images):
        name = list(sources)[number % len(sources)]
        (root / name / f"{number:04}.jpg").write_bytes(_cut(sources[name], rng))


def _cut(source: Image.Image, rng: np.random.Generator) -> bytes:
    """Cut a random window out of a photograph, scale it to 500 x 375 (mildly up where it is small), and encode it."""
    scale = max(WIDTH / source.width, HEIGHT / source.height) * rng.uniform(1, _CLOSEST)
    width, height = WIDTH / scale, HEIGHT / scale
    left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
    box = (left, top, min(left + width, source.width), min(top + height, source.height))
    image = source.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), QUALITY, "RGB", SUBSAMPLING))
