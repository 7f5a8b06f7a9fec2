"""The launched kernels against the reference on the CPU. Everything else about them is tested without a GPU."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fasttht import kernels
from fasttht.kernels import cuda, draws, reference

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAID: dict[str, Any] = {"mean": MEAN, "std": STD, "layout": "s2d"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device on which only kernels will do."""
    monkeypatch.setenv("FASTTHT_KERNELS", "cuda")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def _no_sync(gpu: torch.device) -> Iterator[None]:
    """Fail on anything that makes the host wait."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def images(device: torch.device, dtype: torch.dtype = torch.float32, rows: int = 4, side: int = 64) -> torch.Tensor:
    levels = torch.randint(256, (rows, 3, side, side), generator=torch.Generator().manual_seed(rows))
    x = levels.to(dtype) if dtype == torch.uint8 else levels.to(dtype) / 255
    return x.to(device, memory_format=torch.channels_last)


def test_launched_kernels_equal_the_reference(op: str, gpu: torch.device, samples: Any) -> None:
    """All types, layouts, odd sizes, misaligned storage and empty tensors, bit for bit."""
    cases = samples.cases(op)
    before = cuda.ran[op, "cuda"]
    for case in cases:
        samples.assert_same(samples.run(case, gpu), samples.run(case, CPU))
    assert cuda.ran[op, "cuda"] == before + len(cases)


def test_a_real_batch_goes_through_every_op_of_an_attack(gpu: torch.device) -> None:
    """64 images of 224 pixels: more work than threads."""
    x = images(CPU, rows=64, side=224)
    index = torch.arange(64) * 7
    key: dict[str, Any] = {"eps": 16 / 255, "clean_prob": 0.0, "seed": 1, "epoch": 2, "step": 3}
    expected = draws.draw_start(x, index, **key)
    x_gpu = x.to(gpu)
    state = kernels.draw_start(x_gpu, index.to(gpu), **key)
    assert torch.equal(state.cpu(), expected)
    grad = torch.randn(reference.input_shape(x.shape, "s2d"), generator=torch.Generator().manual_seed(0)).half()
    grad = grad.contiguous(memory_format=torch.channels_last)
    out = kernels.empty_model_input(x_gpu, torch.float16, "s2d")
    kernels.pgd_linf_step_input_(state, out, grad.to(gpu), x_gpu, eps=16 / 255, alpha=4 / 255, **LAID)
    expected_out = torch.empty_like(grad)
    reference.pgd_linf_step_input_(expected, expected_out, grad, x, eps=16 / 255, alpha=4 / 255, **LAID)
    assert torch.equal(state.cpu(), expected)
    assert torch.equal(out.cpu(), expected_out)


def test_more_elements_than_an_int32_counts(gpu: torch.device) -> None:
    size = 2**31 + 4099
    if torch.cuda.mem_get_info(gpu)[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    x = torch.arange(256, dtype=torch.uint8, device=gpu).repeat(size // 256 + 1)[:size]
    out = kernels.u8_to_input(x, torch.float16)
    table = reference.u8_to_input(torch.arange(256, dtype=torch.uint8), torch.float16)
    for start in (0, 2**30, 2**31 - 2**20, size // 256 * 256 - 2**20):
        rows = out[start : start + 2**20].cpu().view(-1, 256)
        assert torch.equal(rows, table.expand_as(rows))
    assert torch.equal(out[size // 256 * 256 :].cpu(), table[: size % 256])


def test_a_kernel_runs_on_the_current_stream(gpu: torch.device) -> None:
    """Behind what was queued there: the state is only written after a long wait on the side stream."""
    x = images(gpu)
    grad = torch.ones_like(x)
    expected = x.clone()
    kernels.pgd_linf_step_(expected, grad, x, eps=0.1, alpha=0.05)
    state = torch.full_like(x, 0.5)
    side = torch.cuda.Stream(gpu)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        state.copy_(x)
        kernels.pgd_linf_step_(state, grad, x, eps=0.1, alpha=0.05)
    side.synchronize()
    assert torch.equal(state, expected)
    assert not torch.equal(state, x)


def test_a_kernel_runs_from_a_thread_that_never_touched_the_gpu(gpu: torch.device) -> None:
    """As in a data loader's or autograd's thread: no CUDA context is current there."""
    x = images(gpu)
    state, grad = x.clone(), torch.ones_like(x)
    torch.cuda.synchronize()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            kernels.pgd_linf_step_(state, grad, x, eps=0.1, alpha=0.05)
        except BaseException as err:
            failed.append(err)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert failed == []
    assert bool((state > x).any())


def test_a_kernel_runs_on_a_device_that_is_not_the_current_one(gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1 - gpu.index)
    x = images(other)
    state = x.clone()
    kernels.pgd_linf_step_(state, torch.ones_like(x), x, eps=0.1, alpha=0.05)
    expected = x.cpu()
    reference.pgd_linf_step_(expected, torch.ones_like(expected), x.cpu(), eps=0.1, alpha=0.05)
    assert torch.equal(state.cpu(), expected)
    assert torch.cuda.current_device() == gpu.index


@pytest.mark.usefixtures("_no_sync")
def test_no_op_waits_for_the_device(op: str, gpu: torch.device, samples: Any) -> None:
    case = next(case for case in samples.cases(op) if case.args[0].numel())
    samples.run(case, gpu)
    args = samples.placed(case, gpu)
    torch.cuda.set_sync_debug_mode("error")
    getattr(torch.ops.fasttht, op)(*args)
    torch.cuda.set_sync_debug_mode("default")


def test_a_captured_attack_step_draws_and_steps_anew_at_each_replay(gpu: torch.device) -> None:
    """Start, step, next input, residual backward and bank in one graph; the counters and the bank's cursor move."""
    x, index = images(gpu), torch.arange(4, device=gpu)
    counters = torch.zeros(3, dtype=torch.int64, device=gpu)
    out = kernels.empty_model_input(x, torch.float16, "s2d")
    grad = torch.randn(out.shape, device=gpu, generator=torch.Generator(gpu).manual_seed(0)).half()
    grad = grad.contiguous(memory_format=torch.channels_last)
    masked = torch.empty_like(grad)
    ring = (
        torch.zeros(6, 5, device=gpu),
        torch.full((6,), -1, device=gpu),
        torch.zeros((), dtype=torch.int64, device=gpu),
    )
    feat = torch.ones(4, 5, device=gpu)
    state = torch.empty_like(x)

    def step() -> None:
        state.copy_(kernels.draw_start_at(x, index, counters, eps=0.1, clean_prob=0.0))
        kernels.pgd_linf_step_input_(state, out, grad, x, eps=0.1, alpha=0.02, **LAID)
        masked.copy_(grad)
        kernels.drelu_add_(masked, grad, out)
        kernels.bank_write_(*ring, feat, index)

    side = torch.cuda.Stream(gpu)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # loads the kernels
    torch.cuda.current_stream().wait_stream(side)
    for tensor in ring:
        tensor.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()

    seen = []
    for epoch in range(3):
        counters.copy_(torch.tensor([5, epoch, 7]))
        graph.replay()
        seen.append(state.cpu())
        expected = draws.draw_start(x.cpu(), index.cpu(), eps=0.1, clean_prob=0.0, seed=5, epoch=epoch, step=7)
        expected_out = torch.empty_like(grad, device="cpu")
        host_grad = grad.cpu()
        reference.pgd_linf_step_input_(expected, expected_out, host_grad, x.cpu(), eps=0.1, alpha=0.02, **LAID)
        assert torch.equal(seen[-1], expected)
        assert torch.equal(out.cpu(), expected_out)
        expected_grad = host_grad.clone()
        reference.drelu_add_(expected_grad, host_grad, expected_out)
        assert torch.equal(masked.cpu(), expected_grad)
        assert int(ring[2]) == 4 * (epoch + 1) % 6
    assert not torch.equal(seen[0], seen[1])


def test_the_kernel_takes_as_many_arguments_as_a_launch_has(gpu: torch.device, samples: Any) -> None:
    """As the driver counts them; it reads as many as the kernel has, whatever was packed."""
    backend = cuda.backend(gpu)
    assert isinstance(backend, cuda.CudaCore)
    seen = set()

    class Recorder:
        def launch(self, launch: Any, device: torch.device) -> None:
            if launch.kernel not in seen:
                seen.add(launch.kernel)
                kernel = backend._kernel(launch.source, launch.kernel, launch.defines, cuda._arch(gpu.index))
                assert kernel.num_arguments == len(launch.args)
            backend.launch(launch, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "backend", lambda device: Recorder() if device.type == "cuda" else None)
        for case in samples.all:
            if case.args[0].numel():
                samples.run(case, gpu)
    assert len(seen) == 13
