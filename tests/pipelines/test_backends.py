"""Which decoder runs: what was asked for if it can, else the reason; `auto` says why it took what it took."""

from typing import Any

import pytest
import torch

from fasttht.pipelines import backends
from fasttht.pipelines.host_memory import HostMemory
from fasttht.pipelines.loader import Loader
from fasttht.pipelines.plan import Augment, EpochPlan, Index
from fasttht.pipelines.stages import Stages

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What looks as if it were installed."""
    modules: set[str] = set()
    monkeypatch.setattr(backends, "_installed", modules.__contains__)
    return modules


def test_auto_is_turbo_on_cpu() -> None:
    assert backends.choose("auto", CPU) == ("turbo", "no GPU to decode on")


@pytest.mark.parametrize(
    ("capability", "has_dali", "hint"), [((7, 0), True, False), ((8, 0), True, True), ((9, 0), True, True),
                                         ((8, 6), True, False), ((8, 0), False, False)],
)  # fmt: skip
def test_auto_keeps_the_gpu_free_and_points_at_its_jpeg_engine_if_it_has_one(
    capability: tuple[int, int], has_dali: bool, hint: bool, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    installed.update({"nvidia.dali"} if has_dali else set())
    name, reason = backends.choose("auto", CUDA)
    assert name == "turbo"
    assert ("--loader dali-gpu" in reason) == hint


@pytest.mark.parametrize("name", backends.DECODERS)
def test_what_is_asked_for_is_taken(name: str) -> None:
    assert backends.choose(name, CUDA) == (name, "as asked")


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
