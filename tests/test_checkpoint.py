"""Checkpoints: every bit comes back, into the strides of the live tensors; a damaged one is never used."""

import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttht import checkpoint
from fasttht.errors import CheckpointError

Files = dict[str, dict[str, Tensor]]
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip
META: dict[str, Any] = {"step": 3, "loader": {"epoch": 1, "fingerprint": "ab"}, "names": ["a", "b"]}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bits at all, NaN payloads and subnormals among them; bool is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (math.prod(shape) * size,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def files_of(seed: int = 0) -> Files:
    return {
        "model": {"weight": random_bits((4, 3, 2, 2), torch.float32, seed), "count": torch.tensor(seed)},
        "training": {"delta": random_bits((5,), torch.float64, seed), "scale": torch.tensor(1.5)},
    }


def zeros_like(files: Files) -> Files:
    return {name: {key: torch.zeros_like(t) for key, t in group.items()} for name, group in files.items()}


def assert_same(found: Files, expected: Files) -> None:
    assert found.keys() == expected.keys()
    for name, group in expected.items():
        assert found[name].keys() == group.keys()
        for key, tensor in group.items():
            assert found[name][key].dtype == tensor.dtype
            assert found[name][key].shape == tensor.shape
            assert bits(found[name][key]) == bits(tensor), f"{name} {key}"


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7,), (3, 17, 5), (4, 3, 5, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_every_type_and_shape_comes_back(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    files = {"model": {"x": random_bits(shape, dtype), "other": random_bits((2,), dtype, 1)}}
    folder = checkpoint.save(tmp_path, 3, files, META, keep=2)
    live = zeros_like(files)
    checkpoint.restore(folder, live)
    assert_same(live, files)


def layouts() -> dict[str, Tensor]:
    x = random_bits((4, 3, 5, 2), torch.float32)
    return {
        "contiguous": x.clone(),
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.permute(1, 0, 3, 2),
        "a slice": random_bits((9, 3), torch.float32)[::2, 1:],
        "0-dim": torch.tensor(2.5),
        "one channel, channels_last": random_bits((4, 1, 5, 2), torch.float32).to(memory_format=torch.channels_last),
        "1x1, channels_last": random_bits((4, 3, 1, 1), torch.float32).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("stored", layouts())
def test_values_survive_any_layout_and_strides_are_those_of_the_live_tensor(tmp_path: Path, stored: str) -> None:
    value = layouts()[stored]
    folder = checkpoint.save(tmp_path, 1, {"training": {"x": value}}, META, keep=2)
    for name, live in layouts().items():
        if live.shape != value.shape:
            continue
        strides, address = live.stride(), live.data_ptr()
        live.zero_()
        checkpoint.restore(folder, {"training": {"x": live}})
        assert bits(live) == bits(value), name
        assert (live.stride(), live.data_ptr()) == (strides, address), name


def test_tensors_that_share_memory_are_saved_and_stay_shared(tmp_path: Path) -> None:
    x = random_bits((6,), torch.float32)
    folder = checkpoint.save(tmp_path, 1, {"model": {"a": x, "b": x}}, META, keep=2)
    live = torch.zeros(6)
    checkpoint.restore(folder, {"model": {"a": live, "b": live}})
    assert bits(live) == bits(x)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(random_bits((4, 3, 2, 2), torch.float32).to(memory_format=torch.channels_last))
    before, strides = bits(weight.detach()), weight.stride()
    checkpoint.save(tmp_path, 1, {"model": {"weight": weight}}, META, keep=2)
    assert bits(weight.detach()) == before
    assert weight.stride() == strides
    assert weight.requires_grad


def test_restoring_into_parameters_keeps_them_leaves_that_require_gradients(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, {"model": {"weight": torch.ones(3)}}, META, keep=2)
    weight = torch.nn.Parameter(torch.zeros(3))
    checkpoint.restore(folder, {"model": {"weight": weight}})
    assert weight.tolist() == [1, 1, 1]
    assert weight.is_leaf
    assert weight.requires_grad


def step_with(momentum: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """One step of fused SGD on a channels-last weight with this momentum buffer; returns the weight."""
    weight = torch.nn.Parameter(tensors["weight"].to(memory_format=torch.channels_last))
    weight.grad = tensors["grad"].to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.5, fused=True)
    optimizer.state[weight]["momentum_buffer"] = momentum
    optimizer.step()
    return weight.detach()


def test_restored_momentum_gives_the_weights_that_the_live_one_would_have(tmp_path: Path) -> None:
    """Also why strides matter: fused SGD pairs up memory, not elements, and nothing warns of it."""
    generator = torch.Generator().manual_seed(0)
    names = ("weight", "grad", "momentum")
    tensors = {name: torch.randn(4, 3, 2, 2, generator=generator) for name in names}
    expected = tensors["weight"] - 0.5 * (0.5 * tensors["momentum"] + tensors["grad"])
    live = tensors["momentum"].to(memory_format=torch.channels_last)
    folder = checkpoint.save(tmp_path, 1, {"training": {"momentum": live}}, META, keep=2)
    restored = torch.zeros_like(live)
    checkpoint.restore(folder, {"training": {"momentum": restored}})
    torch.testing.assert_close(step_with(restored, tensors), expected, rtol=1e-6, atol=1e-6)
    loaded = checkpoint.read_tensors(folder / "training.safetensors")["momentum"]  # contiguous, as on disk
    assert torch.equal(loaded, tensors["momentum"])
    assert not torch.allclose(step_with(loaded, tensors), expected, rtol=0.1, atol=0.1)


def test_meta_comes_back(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 3, files_of(), META, keep=2)
    assert checkpoint.read_meta(folder) == META


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_rotation_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    steps = [1, 2, 9, 10, 100, 12345678]
    for number, step in enumerate(steps, start=1):
        folder = checkpoint.save(tmp_path, step, files_of(step), META, keep=keep)
        expected = [tmp_path / "checkpoints" / f"step-{kept:08d}" for kept in steps[max(number - keep, 0) : number]]
        assert checkpoint.listing(tmp_path) == expected
        assert checkpoint.newest(tmp_path, [].append) == folder == expected[-1]
    assert sorted((tmp_path / "checkpoints").iterdir()) == expected


def test_a_step_that_is_reached_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = checkpoint.save(tmp_path, 5, files_of(seed), META, keep=2)
    live = zeros_like(files_of())
    checkpoint.restore(folder, live)
    assert_same(live, files_of(2))
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]


def test_only_folders_that_are_named_as_ours_are_listed_rotated_or_removed(tmp_path: Path) -> None:
    parent = tmp_path / "checkpoints"
    theirs = ["step-best", "step-00000002-keep", "step-7", "step-00000009.0", "step-000000010", ".partial-mine"]
    for name in theirs:
        (parent / name).mkdir(parents=True)
        (parent / name / "precious").touch()
    for name in ("step-notes.txt", "step-00000004", ".partial-notes"):  # files, one with a checkpoint's name
        (parent / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (parent / "step-00000099").symlink_to(tmp_path / "elsewhere")
    (parent / ".partial-step-00000002").mkdir()  # what a kill left of one of ours
    saved = [checkpoint.save(tmp_path, step, files_of(step), META, keep=2) for step in (1, 2, 3, 4)]
    assert saved[-1].name == "step-00000004.1"
    assert checkpoint.listing(tmp_path) == saved[2:]
    assert all((parent / name / "precious").exists() for name in theirs)
    assert (parent / "step-00000099").is_symlink()
    assert len(list(parent.iterdir())) == len(theirs) + 4 + 2


def test_checkpoints_are_in_the_order_of_their_steps_whatever_the_length_of_their_names(tmp_path: Path) -> None:
    names = ["step-00000009", "step-00000010", "step-00000010.2", "step-00000010.11", "step-99999999", "step-100000000"]
    for name in reversed(names):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoint.listing(tmp_path)] == names
    assert [checkpoint.step_of(path) for path in checkpoint.listing(tmp_path)] == [9, 10, 10, 10, 99999999, 100000000]


def test_the_new_one_of_a_step_that_is_reached_again_wins_even_if_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the two; its name is behind the old one's each time."""
    for seed in (1, 2):
        checkpoint.save(tmp_path, 5, files_of(seed), META, keep=2)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **options: None)
    folder = checkpoint.save(tmp_path, 5, files_of(3), META, keep=2)
    assert checkpoint.newest(tmp_path, checkpoint.refuse) == folder


def test_the_first_save_syncs_the_folder_that_holds_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    original = checkpoint.sync
    monkeypatch.setattr(checkpoint, "sync", lambda path: (synced.append(path), original(path)))
    folder = checkpoint.save(tmp_path, 1, files_of(1), META, keep=2)
    assert {tmp_path, folder.parent} <= set(synced)
    assert synced[-1] == folder.parent


@pytest.mark.parametrize("call", ["_check_room", "save_file", "_sha256", "sync"])
def test_a_second_signal_in_a_save_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """KeyboardInterrupt is no Exception; the older checkpoint is as it was."""
    older = checkpoint.save(tmp_path, 1, files_of(1), META, keep=1)

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, files_of(2), META, keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.listing(tmp_path) == []
    assert checkpoint.newest(tmp_path, [].append) is None


PARTS = ["model.safetensors", "training.safetensors", "state.json", "MANIFEST.json"]


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << (position % 8)
    path.write_bytes(content)


DAMAGES: dict[str, Any] = {
    "a bit of the first byte": lambda path: flip_bit(path, 0),
    "a bit in the middle": lambda path: flip_bit(path, path.stat().st_size // 2),
    "a bit of the last byte": lambda path: flip_bit(path, path.stat().st_size - 1),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut to nothing": lambda path: path.write_bytes(b""),
    "a byte too long": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_older_checkpoint_is_taken(tmp_path: Path, part: str, damage: str) -> None:
    older = checkpoint.save(tmp_path, 1, files_of(1), META, keep=2)
    newer = checkpoint.save(tmp_path, 2, files_of(2), META, keep=2)
    checkpoint.verify(newer)
    DAMAGES[damage](newer / part)
    with pytest.raises(CheckpointError, match=str(newer)):
        checkpoint.verify(newer)
    assert checkpoint.newest(tmp_path, [].append) == older
    live = zeros_like(files_of())
    checkpoint.restore(older, live)
    assert_same(live, files_of(1))
    DAMAGES[damage](older / part)
    with pytest.raises(CheckpointError, match=rf"{newer}.*no older checkpoint is whole"):
        checkpoint.newest(tmp_path, [].append)


def test_no_flipped_bit_of_the_small_files_passes(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, files_of(), META, keep=2)
    for part in ("MANIFEST.json", "state.json"):
        content = (folder / part).read_bytes()
        for position in range(0, len(content), 3):
            flip_bit(folder / part, position)
            with pytest.raises(CheckpointError):
                checkpoint.verify(folder)
            (folder / part).write_bytes(content)
    checkpoint.verify(folder)


@pytest.mark.parametrize("change", ["another shape", "another type", "one more", "one less", "another file"])
@pytest.mark.parametrize("name", ["aaa", "zzz"])
def test_tensors_that_do_not_fit_are_refused_by_name_and_nothing_is_copied(
    tmp_path: Path, name: str, change: str
) -> None:
    """Whether the name comes before all others or behind them."""
    files = files_of()
    files["training"][name] = random_bits((2, 3), torch.float32, 7)
    folder = checkpoint.save(tmp_path, 1, files, META, keep=2)
    live = zeros_like(files)
    words = rf"training.safetensors: expected {name} float32 \(2, 3\), got nothing"
    if change == "another shape":
        live["training"][name] = torch.zeros(3, 2)
        words = rf"training.safetensors: expected {name} float32 \(3, 2\), got float32 \(2, 3\)"
    elif change == "another type":
        live["training"][name] = torch.zeros(2, 3, dtype=torch.float64)
        words = rf"training.safetensors: expected {name} float64 \(2, 3\), got float32 \(2, 3\)"
    elif change == "one less":
        del live["training"][name]
        words = rf"training.safetensors: expected {name} nothing, got float32 \(2, 3\)"
    elif change == "one more":
        live["training"][f"{name}2"] = torch.zeros(2, 3)
        words = words.replace(name, f"{name}2")
    else:
        live[name] = {"x": torch.zeros(1)}
        words = f"{name}.safetensors: expected a safetensors file"
    with pytest.raises(CheckpointError, match=words):
        checkpoint.restore(folder, live)
    assert not any(bool(tensor.any()) for group in live.values() for tensor in group.values())


def test_every_file_is_plain_json_or_safetensors(tmp_path: Path) -> None:
    """Nothing that could run code when it is opened: no pickle, no zip (torch.save writes one)."""
    folder = checkpoint.save(tmp_path, 1, files_of(), META, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == sorted(PARTS)
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not zipfile.is_zipfile(path)
        if path.suffix == ".json":
            json.loads(content)
            continue
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        assert set(header) == set(files_of()[path.stem])
        ends = [entry["data_offsets"][1] for entry in header.values()]
        assert 8 + size + max(ends) == len(content)  # a header, the bytes, and nothing else


class DiskFullError(Exception):
    pass


@pytest.mark.parametrize("call", ["save_file", "_sha256", "sync"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_save_that_fails_leaves_the_older_checkpoint_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    older = checkpoint.save(tmp_path, 1, files_of(1), META, keep=1)
    calls = []
    original = getattr(checkpoint, call)

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            raise DiskFullError
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, call, failing)
        with pytest.raises(DiskFullError):
            checkpoint.save(tmp_path, 2, files_of(2), META, keep=1)
    assert checkpoint.newest(tmp_path, [].append) == older
    assert checkpoint.listing(tmp_path) == [older]
    newer = checkpoint.save(tmp_path, 2, files_of(2), META, keep=1)
    assert checkpoint.newest(tmp_path, [].append) == newer
    assert sorted((tmp_path / "checkpoints").iterdir()) == [newer]


@pytest.mark.parametrize("number", [0, 1])
def test_a_save_of_the_same_step_that_fails_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Whichever rename fails; 0 stands for the one of another step, the ordinary case."""
    old = checkpoint.save(tmp_path, 1, files_of(1), META, keep=1)
    calls = []
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == max(number, 1):
            raise DiskFullError
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(DiskFullError):
            checkpoint.save(tmp_path, 1 if number else 2, files_of(2), META, keep=1)
    assert checkpoint.newest(tmp_path, [].append) == old
    assert checkpoint.listing(tmp_path) == [old]
    live = zeros_like(files_of())
    checkpoint.restore(old, live)
    assert_same(live, files_of(1))


def test_rotation_keeps_what_was_just_saved_and_removes_what_lies_behind_it(tmp_path: Path) -> None:
    """Resumed from step 1 because step 5 is damaged, then stopped at step 3."""
    checkpoint.save(tmp_path, 1, files_of(1), META, keep=2)
    damaged = checkpoint.save(tmp_path, 5, files_of(5), META, keep=2)
    (damaged / "state.json").unlink()
    saved = checkpoint.save(tmp_path, 3, files_of(3), META, keep=1)
    assert checkpoint.newest(tmp_path, [].append) == saved
    assert checkpoint.listing(tmp_path) == [saved]
