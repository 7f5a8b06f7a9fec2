#!/usr/bin/env python3
"""Render a data set of many classes, the characters of this machine's fonts: train/ and val/, a folder per character.

tools/render_characters.py --output /data/characters
fasttht train --data /data/characters --img-size 16 --stem small ...

The fonts of val/ are of families that train/ never shows. Characters are letters and numbers of the Latin, Greek and
Cyrillic scripts that every font can draw; where two look alike in any of the fonts, the later one is left out.
The same fonts and options give the same files. On Debian: fonts-dejavu fonts-liberation fonts-freefont-ttf.
"""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCRIPTS = (range(0x21, 0x7F), range(0xA1, 0x180), range(0x391, 0x3CF), range(0x401, 0x460))
SUPERSAMPLING = 4
PROBE = 32  # pixels: characters are compared at this size


def main() -> None:
    """Parse the words, render, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write train/ and val/ into")
    parser.add_argument("--fonts", type=Path, nargs="+", default=[Path("/usr/share/fonts")], help="folders of fonts")
    parser.add_argument("--classes", type=int, default=256, help="characters at most")
    parser.add_argument("--train-images", type=int, default=24, help="training images of each character")
    parser.add_argument("--val-images", type=int, default=6, help="held-out images of each character")
    parser.add_argument("--size", type=int, default=16, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists() and any(args.output.iterdir()):
        sys.exit(f"--output: expected a new or an empty folder, got {args.output}; give another one")
    train, val = split_families(find_fonts(args.fonts))
    if not train or not val:
        sys.exit(f"--fonts: expected fonts of two families, got {len(train) + len(val)} files; install some more")
    characters = choose_characters([*train, *val])[: args.classes]
    for split, fonts, num in (("train", train, args.train_images), ("val", val, args.val_images)):
        for label, character in enumerate(characters):
            folder = args.output / split / f"U+{ord(character):04X}"
            folder.mkdir(parents=True)
            for i in range(num):
                rng = np.random.default_rng([args.seed, label, i, split == "val"])
                path = fonts[i % len(fonts)]
                render(character, path, args.size, rng).save(folder / f"{i:03}-{path.stem}.png")
    print(f"{len(characters)} characters; train: {len(train)} fonts, {len(characters) * args.train_images} images; "
          f"val: {len(val)} other fonts, {len(characters) * args.val_images} images")  # fmt: skip


def find_fonts(folders: list[Path]) -> list[Path]:
    """Return the font files below some folders that can draw Latin, Greek and Cyrillic letters, by name."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf"))
    return [path for path in files if all(is_drawn(ImageFont.truetype(path, PROBE), text) for text in "A\u03a9\u0416")]


def split_families(fonts: list[Path]) -> tuple[list[Path], list[Path]]:
    """Return the fonts of three quarters of the families, and those of the others; at least one family each.

    A family is the first two words of its name: DejaVu Sans and DejaVu Sans Condensed are one, DejaVu Serif another.
    """
    families: defaultdict[str, list[Path]] = defaultdict(list)
    for path in fonts:
        name = ImageFont.truetype(path, PROBE).getname()[0] or path.stem
        families[" ".join(name.split()[:2])].append(path)
    names = sorted(families)
    held_out = names[3::4] or names[1:][-1:]
    return (
        [path for name in names if name not in held_out for path in families[name]],
        [path for name in held_out for path in families[name]],
    )


def choose_characters(fonts: list[Path]) -> list[str]:
    """Return the characters that every font draws, and none draws as it does one before."""
    opened = [ImageFont.truetype(path, PROBE) for path in fonts]
    seen: list[set[bytes]] = [set() for _ in opened]
    chosen = []
    for code in (code for script in SCRIPTS for code in script):
        character = chr(code)
        if unicodedata.category(character)[0] not in "LN" or not all(is_drawn(font, character) for font in opened):
            continue
        drawn = [bytes(font.getmask(character)) for font in opened]
        if not any(mask in known for mask, known in zip(drawn, seen, strict=True)):
            chosen.append(character)
        for mask, known in zip(drawn, seen, strict=True):
            known.add(mask)
    return chosen


def is_drawn(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether a font has a character: one that it lacks is drawn as its box for missing ones."""
    mask = bytes(font.getmask(character))
    return any(mask) and mask != bytes(font.getmask("\uffff"))


def render(character: str, path: Path, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw a character light on dark or dark on light, at a random size, place and angle."""
    side = size * SUPERSAMPLING
    font = ImageFont.truetype(path, round(side * rng.uniform(0.7, 0.85)))
    dark, light = (int(level) for level in (rng.integers(0, 80), rng.integers(176, 256)))
    ink, paper = (light, dark) if rng.random() < 0.5 else (dark, light)
    image = Image.new("L", (side, side), paper)
    left, top, right, bottom = font.getbbox(character)
    shift = rng.uniform(-0.06, 0.06, 2) * side
    place = ((side - left - right) / 2 + shift[0], (side - top - bottom) / 2 + shift[1])
    ImageDraw.Draw(image).text(place, character, fill=ink, font=font)
    image = image.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=paper)
    return image.resize((size, size), Image.Resampling.BOX).convert("RGB")


if __name__ == "__main__":
    main()
