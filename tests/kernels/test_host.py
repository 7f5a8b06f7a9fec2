"""Every kernel as the host compiler builds it, launched as a GPU would be, against the reference: bit for bit."""

from typing import Any

import pytest
import torch

from fasttht.kernels import cuda, ops

CPU = torch.device("cpu")


@pytest.mark.parametrize("threads", [1, 300])
def test_kernels_equal_the_reference(op: str, threads: int, samples: Any, host: Any, monkeypatch: Any) -> None:
    """All types, layouts, odd sizes and misaligned storage; one thread that loops, and more threads than work."""
    host.threads = threads
    for case in samples.cases(op):
        found = samples.run(case, CPU)
        with monkeypatch.context() as patch:
            patch.setattr(cuda, "backend", lambda device: None)
            expected = samples.run(case, CPU)
        samples.assert_same(found, expected)


def test_every_sample_ran_its_kernel(op: str, samples: Any, host: Any) -> None:
    """Or the test above compares the reference with itself."""
    kernels = {
        "pgd_linf_step_": ["pgd_step"],
        "pgd_lattice_step_": ["pgd_step"],
        "pgd_linf_step_input_": ["pgd_step_input"],
        "pgd_lattice_step_input_": ["pgd_step_input"],
        "draw_lattice_start": ["draw_start"],
        "free_delta_step_": ["free_step"],
        "model_input_": ["model_input"],
        "bank_write_": ["bank_write", "bank_advance"],
        "drelu_add_": ["drelu_add"],
        "bn_relu_sums": ["bn_relu_sums", "bn_relu_fold", "bn_relu_fold"],
        "bn_relu_grad_": ["bn_relu_grad"],
    }.get(op, [op])
    num_empty = 0
    for case in samples.cases(op):
        before, counted = len(host.launched), cuda.ran[op, "cuda"]
        samples.run(case, CPU)
        assert cuda.ran[op, "cuda"] == counted + 1
        written = case.args[3] if op == "bank_write_" else case.args[0]
        num_empty += written.numel() == 0
        assert host.launched[before:] == ([] if written.numel() == 0 else kernels)
    assert 0 < num_empty < len(samples.cases(op))


def test_every_variant_is_reached(samples: Any, host_library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples launch exactly the variants that are compiled for GPUs elsewhere in these tests."""
    seen = set()

    class Recorder:
        def launch(self, launch: Any, device: torch.device) -> None:
            seen.add((launch.source, launch.defines))

    monkeypatch.setattr(cuda, "backend", lambda device: Recorder())
    for op in sorted({case.op for case in samples.all}):
        for case in samples.cases(op):
            samples.run(case, CPU)
    assert seen == set(samples.variants)


def test_samples_are_both_aligned_and_misaligned(op: str, samples: Any) -> None:
    """Both the vector loop and the element loop must have run."""
    if op == "bank_write_":
        pytest.skip("goes element by element")
    offsets = {samples.placed(case, CPU)[0].data_ptr() % 16 == 0 for case in samples.cases(op)}
    assert offsets == {True, False}


def test_a_step_keeps_to_the_elements_of_its_tensor(samples: Any, host: Any) -> None:
    """A slice of a larger tensor: what lies before and behind stays as it was."""
    whole = torch.full((40,), 7.0)
    x_adv, grad, x = whole[3:36].zero_(), torch.ones(33), torch.ones(33)
    torch.ops.fasttht.pgd_linf_step_(x_adv, grad, x, 0.5, 0.25)
    assert host.launched == ["pgd_step"]
    assert whole.tolist() == [7.0] * 3 + [0.5] * 33 + [7.0] * 4


@pytest.mark.parametrize("layout", ["plain", "pad4", "s2d"])
def test_the_next_input_may_replace_the_gradient(layout: str, samples: Any, host: Any) -> None:
    cases = [case for case in samples.cases("pgd_linf_step_input_") if case.args[-1] == layout]
    for case in cases:
        x_adv, out, grad, *rest = samples.placed(case, CPU)
        torch.ops.fasttht.pgd_linf_step_input_(x_adv, out, grad, *rest)
        again, _, shared, *rest = samples.placed(case, CPU)
        torch.ops.fasttht.pgd_linf_step_input_(again, shared, shared, *rest)
        samples.assert_same([again, shared], [x_adv, out])
    assert len(cases) > 5


def test_public_ops_give_what_registered_ones_give(samples: Any, host: Any) -> None:
    """CPU tensors go straight to the reference; here the registered op runs the kernel on the same call."""
    x, index = samples.pixels((2, 3, 6, 8), torch.float32, 0), torch.tensor([3, 2**40])
    counters = {"seed": 2**64 - 1, "epoch": 2, "step": 3}
    direct = ops.draw_start(x, index, eps=0.1, clean_prob=0.5, **counters)
    at = torch.tensor([-1, 2, 3])
    assert host.launched == []
    assert torch.equal(ops.draw_start_at(x, index, at, eps=0.1, clean_prob=0.5), direct)
    assert torch.equal(torch.ops.fasttht.draw_start(x, index, at, 0.1, 0.5, 0, 0, 0), direct)
    assert host.launched == ["draw_start"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_precision_breaks_ties_as_torch_does(dtype: torch.dtype, host: Any) -> None:
    """Every midpoint of two neighbours, and the float32 numbers on either side of it, through the bank's cast."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = numbers[numbers.isfinite()].double().unique()
    ties = ((finite[1:] + finite[:-1]) / 2).float()
    # NaNs whose payload would carry into the sign if they were rounded like numbers.
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int64).to(torch.int32).view(torch.float32)
    feat = torch.cat([ties, ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-9e9)), nans]).view(-1, 1)
    rows = len(feat)
    ring = torch.zeros(rows, 1, dtype=dtype), torch.zeros(rows, dtype=torch.int64), torch.tensor(0)
    torch.ops.fasttht.bank_write_(*ring, feat, torch.arange(rows))
    assert host.launched == ["bank_write", "bank_advance"]
    assert bool(ring[0][-3:].isnan().all())
    assert torch.equal(ring[0][:-3], feat[:-3].to(dtype))


def test_autograd_learns_of_what_a_kernel_wrote(op: str, samples: Any, host: Any) -> None:
    """Each changed tensor's version counts up, so a backward that saved it before fails rather than being wrong."""
    schema = getattr(torch.ops.fasttht, op).default._schema
    written = [i for i, arg in enumerate(schema.arguments) if arg.alias_info is not None and arg.alias_info.is_write]
    args = samples.placed(samples.cases(op)[0], CPU)
    before = [arg._version if isinstance(arg, torch.Tensor) else None for arg in args]
    getattr(torch.ops.fasttht, op)(*args)
    after = [arg._version if isinstance(arg, torch.Tensor) else None for arg in args]
    assert host.launched != []
    assert [i for i in range(len(args)) if after[i] != before[i]] == written
    with torch.inference_mode():  # where tensors have no version
        getattr(torch.ops.fasttht, op)(*samples.placed(samples.cases(op)[0], CPU))
