"""Which decoder runs: what was asked for if it can, else the reason; `auto` says why it took what it took."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from fasttht.pipelines import backends, dali_graph
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.beton_write import write_beton
from fasttht.pipelines.host_memory import HostMemory
from fasttht.pipelines.loader import Loader
from fasttht.pipelines.plan import Augment, EpochPlan, Index
from fasttht.pipelines.samples import Sample
from fasttht.pipelines.stages import Stages

JPEG = Sample("jpg", np.frombuffer(simplejpeg.encode_jpeg(np.zeros((8, 9, 3), np.uint8)), np.uint8), 8, 9)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What looks as if it were installed."""
    modules: set[str] = set()
    monkeypatch.setattr(backends, "_installed", modules.__contains__)
    monkeypatch.setattr(backends, "_what_breaks", lambda name, device: None)
    return modules


@pytest.fixture
def jpegs(tmp_path: Path) -> BetonFile:
    write_beton(tmp_path / "jpegs.beton", [(JPEG, 0), (JPEG, 1)], 2)
    return BetonFile(tmp_path / "jpegs.beton")


def test_auto_is_turbo_on_cpu(jpegs: BetonFile) -> None:
    assert backends.choose("auto", CPU, jpegs) == ("turbo", "no GPU to decode on")


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 0), "turbo"), ((7, 5), "turbo"), ((8, 0), "dali-gpu"), ((8, 6), "turbo"),
                               ((8, 9), "turbo"), ((9, 0), "dali-gpu"), ((10, 0), "dali-gpu"), ((12, 0), "turbo")],
)  # fmt: skip
def test_auto_decodes_on_the_gpu_where_that_has_a_jpeg_engine(
    capability: tuple[int, int], chosen: str, installed: set[str], jpegs: BetonFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    installed.add("nvidia.dali")
    name, reason = backends.choose("auto", CUDA, jpegs)
    assert name == chosen
    assert ("JPEG engine" in reason) == ("not measured" in reason) == (chosen == "dali-gpu")


def test_auto_says_why_it_leaves_a_jpeg_engine_alone(
    installed: set[str], jpegs: BetonFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    name, reason = backends.choose("auto", CUDA, jpegs)
    assert (name, "DALI is not installed" in reason) == ("turbo", True)
    installed.add("nvidia.dali")
    monkeypatch.setattr(backends, "_what_breaks", lambda name, device: "expected a driver, got none; install one")
    name, reason = backends.choose("auto", CUDA, jpegs)
    assert name == "turbo"
    assert reason == "this GPU has a JPEG engine, but for dali-gpu expected a driver, got none; install one"
    # DALI leaves rows of pixels, and what is no .beton, to one thread of the embedded decoder.
    write_beton(tmp_path / "mixed.beton", [(JPEG, 0), (Sample("raw", np.zeros(3, np.uint8), 1, 1), 1)], 2)
    others: list[Any] = [BetonFile(tmp_path / "mixed.beton"), NoSamples(3)]
    for samples in others:
        name, reason = backends.choose("auto", CUDA, samples)
        assert (name, "not all JPEGs in a .beton file" in reason) == ("turbo", True)


@pytest.mark.parametrize("name", backends.DECODERS)
def test_what_is_asked_for_is_taken(name: str, jpegs: BetonFile) -> None:
    assert backends.choose(name, CUDA, jpegs) == (name, "as asked")


@pytest.mark.parametrize(
    ("name", "device", "modules", "said"),
    [
        ("turbo", CPU, set(), None), ("synthetic", CPU, set(), None),
        ("ffcv", CPU, {"ffcv"}, None), ("ffcv", CPU, set(), "the ffcv package is not installed"),
        ("dali-cpu", CPU, {"nvidia.dali"}, None), ("dali-cpu", CPU, set(), "NVIDIA DALI is not installed"),
        ("dali-gpu", CUDA, {"nvidia.dali"}, None), ("dali-gpu", CUDA, set(), "NVIDIA DALI is not installed"),
        ("dali-gpu", CPU, {"nvidia.dali"}, "it decodes on a CUDA device and this run is on cpu"),
    ],
)  # fmt: skip
def test_a_decoder_that_cannot_run_says_why(
    name: str, device: torch.device, modules: set[str], said: str | None, installed: set[str]
) -> None:
    installed.update(modules)
    found = backends.why_not(name, device)
    assert (found is None) if said is None else (found is not None and found.startswith(said))


def test_a_module_of_a_package_that_is_not_there_is_not_installed() -> None:
    assert backends._installed("json.decoder")
    assert not backends._installed("no_such_package.part")
    assert not backends._installed("json.no_such_module")


def test_a_library_that_does_not_load_is_told_from_one_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends._what_breaks.cache_clear()
    (tmp_path / "ffcv").mkdir()
    (tmp_path / "ffcv" / "__init__.py").touch()
    (tmp_path / "ffcv" / "_libffcv.so").write_bytes(b"not a library")
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    found = backends.why_not("ffcv", CPU)
    assert found is not None
    assert found.startswith(f"expected the functions imdecode and resize in {tmp_path}/ffcv/_libffcv.so, got ")
    assert found.endswith("; install ffcv 1.0.2, or take the loader turbo")
    backends._what_breaks.cache_clear()


@pytest.mark.parametrize("error", [OSError("libnvimgcodec.so.0: cannot open shared object file"), RuntimeError("odd")])
def test_a_dali_that_does_not_load_is_told_from_one_that_is_not_there(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise error

    backends._what_breaks.cache_clear()
    monkeypatch.setattr(backends, "_installed", lambda module: True)
    monkeypatch.setattr(dali_graph, "import_module", refuse)
    found = backends.why_not("dali-cpu", CPU)
    assert found == f"expected a DALI that loads, got {error}; install it again, or take the loader turbo"
    backends._what_breaks.cache_clear()


class NoSamples:
    """Labels and nothing else: whoever reads a sample fails."""

    class_names: tuple[str, ...] = ()
    fingerprint = "none"

    def __init__(self, num: int) -> None:
        self.labels: Index = torch.arange(num).numpy() % 5

    def __len__(self) -> int:
        return len(self.labels)

    def sizes(self, index: Index) -> tuple[Index, Index]:
        return index * 0 + 20, index * 0 + 30


def test_synthetic_batches_have_the_plans_rows_and_labels_and_never_touch_the_samples() -> None:
    samples: Any = NoSamples(23)
    plan = EpochPlan(num_samples=23, batch_size=5, seed=1, augment=Augment())
    batches = list(Loader(samples, plan, img_size=7, decoder="synthetic"))
    assert [batch.index.tolist() for batch in batches] == [plan.batch(plan.order(), step).tolist() for step in range(5)]
    for batch in batches:
        assert batch.y.tolist() == (batch.index % 5).tolist()
        assert batch.x.shape == (len(batch.index), 3, 7, 7)
        assert batch.x.is_contiguous(memory_format=torch.channels_last)
        assert batch.x.data_ptr() == batches[0].x.data_ptr()
    counts = torch.bincount(batches[0].x.flatten().long() // 32, minlength=8)
    assert counts.min() > 0.5 * counts.float().mean()  # noise over the whole range


def test_an_unknown_decoder_is_refused() -> None:
    samples: Any = NoSamples(3)
    with pytest.raises(ValueError, match=r"expected one of turbo, ffcv, .*, got jpeg"):
        backends.open_decoder("jpeg", samples, img_size=7, workers=1, device=CPU, stages=Stages())


def test_a_closed_decoder_takes_no_more_requests() -> None:
    samples: Any = NoSamples(3)
    decoder = backends.open_decoder("turbo", samples, img_size=7, workers=1, device=CPU, stages=Stages())
    decoder.close()
    decoder.close()
    request: Any = None
    with pytest.raises(ValueError, match="expected an open one"):
        decoder.start(request)


@pytest.mark.gpu
def test_host_memory_for_a_gpu_is_pinned() -> None:
    assert HostMemory(4, pinned=True).take(2).is_pinned()
