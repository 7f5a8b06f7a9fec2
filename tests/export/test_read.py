"""Reading an export that somebody sent: JSON and safetensors, bounded and compared before anything is built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasttht.errors import CheckpointError
from fasttht.export import is_export, read_export, sha256

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def exported(exported_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_once, tmp_path / "e"))


def change(folder: Path, how: Change) -> None:
    header = json.loads((folder / "model.json").read_text())
    how(header)
    (folder / "model.json").write_text(json.dumps(header))


def refused(path: Path, *fragments: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_export(path)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_or_either_file_in_it_is_read_without_drawing(exported: Path) -> None:
    for path in (exported, exported / "model.json", exported / "model.safetensors"):
        assert is_export(path)
        model, header = read_export(path)
        assert header["class_names"] == [str(i) for i in range(10)]
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert not is_export(exported.parent)
    refused(exported.parent, "model.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arch", "resnet51"), ("arch", ["resnet18"]), ("arch", None), ("stem", "big"), ("width", 10**9), ("width", 0),
        ("width", 4.0), ("width", True), ("classifier", "softmax"), ("feat_dim", -1), ("feat_dim", 10**12),
        ("num_classes", 1), ("num_classes", 10**15), ("class_names", ["one"]), ("class_names", [1] * 10),
        ("class_names", "0123456789"), ("img_size", 0), ("crop_pct", 0), ("crop_pct", 1.5), ("denoise", 1),
        ("mixture_bn", "no"), ("norm", "l7"), ("eps", -0.1), ("eps", "16/255"), ("mean", [0.5, 0.5, 0.5]),
        ("std", [1, 1, 0]), ("sha256", "0" * 63), ("sha256", "g" * 64), ("step", -1), ("step", 10**30), ("scores", []),
        ("fasttht", "9" * 1000), ("format", "fasttht-exact-2"), ("format", {}),
    ],
)  # fmt: skip
def test_every_number_is_bounded_and_every_key_checked(exported: Path, key: str, value: Any) -> None:
    change(exported, lambda header: header.update({key: value}))
    refused(exported, key, "expected")


def test_a_key_that_is_missing_is_named(exported: Path) -> None:
    change(exported, lambda header: header.pop("crop_pct"))
    refused(exported, "crop_pct", "no such key")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"format": NaN}', "[" * 100_000, '"\\u001b[2J"', '{"format": "\\u001b[2J"}', "\xff"],
)
def test_what_is_no_header_is_refused_in_one_clean_line(exported: Path, text: str) -> None:
    (exported / "model.json").write_text(text, encoding="latin-1")
    refused(exported, "model.json")
    with pytest.raises(CheckpointError) as caught:
        read_export(exported)
    assert "\x1b" not in str(caught.value)


def test_a_header_that_fills_memory_is_not_read(exported: Path) -> None:
    with (exported / "model.json").open("r+b") as file:
        file.truncate(2**36)  # sparse
    refused(exported, "at most 64 MiB")


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("width", 4096, "classifier"), ("arch", "resnet34", "layer"), ("arch", "resnet50", "classifier"),
        ("num_classes", 11, "class_names"), ("denoise", True, ".bn.bias"), ("mixture_bn", True, "trunk.bn1"),
        ("classifier", "cosine", "classifier.bias"), ("feat_dim", 8, "feature_head"), ("stem", "imagenet", "conv1"),
    ],
)  # fmt: skip
def test_weights_of_another_network_are_refused_by_name(exported: Path, key: str, value: Any, fragment: str) -> None:
    change(exported, lambda header: header.update({key: value}))
    refused(exported, fragment, "expected")


def test_damaged_weights_are_refused(exported: Path) -> None:
    file = exported / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-40] + bytes(8) + whole[-32:], b""):
        file.write_bytes(damaged)
        refused(exported, "sha256")
    file.unlink()
    refused(exported, "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (lambda t: t.update({"classifier.weight": t["classifier.weight"] * torch.inf}), "finite numbers in classifier"),
        (lambda t: t.update({"classifier.weight": t["classifier.weight"].half()}), "F16"),
        (lambda t: t.update({"more": torch.zeros(1)}), "more"),
        (lambda t: t.pop("trunk.conv1.weight"), "trunk.conv1.weight"),
        (lambda t: t.update({"classifier.weight": torch.zeros(10, 3)}), "(10, 3)"),
    ],
)
def test_weights_with_a_right_sum_but_wrong_content_are_refused(exported: Path, spoil: Change, fragment: str) -> None:
    file = exported / "model.safetensors"
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file)
    change(exported, lambda header: header.update(sha256=sha256(file)))
    refused(exported, fragment)


def test_a_pickle_under_the_weights_name_is_not_opened(exported: Path) -> None:
    file = exported / "model.safetensors"
    torch.save({"x": torch.zeros(1)}, file)
    change(exported, lambda header: header.update(sha256=sha256(file)))
    refused(exported, "safetensors file")


def test_code_beside_the_weights_is_not_executed(exported: Path, tmp_path: Path) -> None:
    (exported / "model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    read_export(exported)
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(exported)
    assert not is_export(exported)
