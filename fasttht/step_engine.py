"""How a training step's forward, backward and update are computed: a ladder, each rung equal to the first but for
rounding. Weight gradients and batch statistics are needed here, so the attack's folding does not apply.

eager     the network and the objective as they are, under autocast.
compiled  both as one function through torch.compile, the same one for every step and replay.
fused     each training-mode batch norm with its addition and ReLU as one op forward and two passes backward.
captured  fused, with everything between two waits of the host recorded as one CUDA graph: a whole replay of free
          training, or of a standard step what follows its attack.

A batch of another size than the run's, the short last one of a pass, is always computed eagerly: code and recordings
are for one shape. So are, with --progressive-size, the passes before images have their final size.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fasttht import kernels
from fasttht.bank import Bank
from fasttht.config import TrainConfig
from fasttht.distributed import SOLO, World
from fasttht.models.fused_norm import fuse_norms
from fasttht.models.two_head import TwoHead
from fasttht.objectives import OBJECTIVES, Terms, Views

Loss = Callable[[Views], Terms]
Inputs = dict[str, Tensor]
Work = Callable[[Inputs], None]
Report = Callable[[str], None]


class Runner(Protocol):
    """Does a piece of work, by itself or from a recording."""

    def __call__(self, work: Work, inputs: Inputs, *, times: int = 1) -> None:
        """Do `work` on `inputs`, `times` times in a row; it may differ from the last call's in its inputs only."""
        ...


@dataclass(frozen=True)
class StepEngine:
    """A rung. loss: the forward and the objective; run: what does the rest; reason: why this one, for people."""

    name: str
    reason: str
    loss: Loss
    run: Runner


def run_plainly(work: Work, inputs: Inputs, *, times: int = 1) -> None:
    """Do the work as it is."""
    for _ in range(times):
        work(inputs)


class CompiledLoss:
    """The forward and the objective as one compiled function, for parts of `rows` images; plain for others.

    side: with images of this side only; None: of any.

    What the compiler cannot do is said once, through `report`, and then computed plainly.
    """

    def __init__(
        self, plain: Loss, rows: int, report: Report, *, backend: str = "inductor", side: int | None = None
    ) -> None:
        def traced(
            x: Tensor,
            x_adv: Tensor,
            y: Tensor,
            index: Tensor,
            feat_clean: Tensor | None,
            feat_batch: Tensor | None,
            index_batch: Tensor | None,
        ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
            terms = plain(Views(x, x_adv, y, index, feat_clean, feat_batch, index_batch))
            return terms.loss, terms.parts, terms.logits

        from torch._dynamo.exc import TorchDynamoException  # a second that the other rungs need not wait

        self._plain, self._report, self._error = plain, report, TorchDynamoException
        self._rows, self._side = rows, side
        # The shape is part of the compiled code.
        self._compiled = torch.compile(traced, fullgraph=True, dynamic=False, backend=backend)
        self._failed, self._ran = False, False

    def __call__(self, views: Views) -> Terms:
        if self._failed or not _fits(views.x, self._rows, self._side):
            return self._plain(views)
        try:
            with warnings.catch_warnings() if not self._ran else nullcontext():
                if not self._ran:
                    warnings.simplefilter("ignore")  # what the compiler says of its own insides
                found = self._compiled(
                    views.x, views.x_adv, views.y, views.index, views.feat_clean, views.feat_batch, views.index_batch
                )
        except self._error as error:  # raised before anything has run
            self._failed = True
            self._report(f"step engine: eager from here on; compiling failed: {_first_line(error)}")
            return self._plain(views)
        self._ran = True
        return Terms(*found)


class Recorder(Protocol):
    """What can record the device's side of some work and do it again without the host's side."""

    def warm(self, work: Callable[[], None]) -> None:
        """Do the work as it will be recorded, so that all it needs to find or load is there."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work without doing it, and return what does it. Raises: RuntimeError if that cannot be."""
        ...


class CudaRecorder:
    """Records CUDA graphs on a stream of its own; other threads, the loader's say, keep working meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm(self, work: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                work()
        except BaseException:
            torch.cuda.set_stream(current)  # torch does not, where ending the capture fails too
            raise
        return graph.replay


class Captured:
    """Work on a full batch: done plainly the first time, which warms up, recorded the second, then only replayed.

    The recording reads buffers of its own, which each call's inputs are copied into. Gradients are made and dropped
    inside of it (`set_to_none`), so they have fixed addresses and need neither clearing nor adding. All else that a
    step changes is changed in place: a checkpoint holds the same tensors as without a recording.

    side: images of another side are no full batch; None: of any.
    abandon: puts the host's side in order after a recording that failed; memory may not suffice for one.
    """

    def __init__(
        self, recorder: Recorder, rows: int, report: Report, abandon: Callable[[], None], *, side: int | None = None
    ) -> None:
        self._recorder, self._report, self._abandon = recorder, report, abandon
        self._rows, self._side = rows, side
        self._warm, self._failed = False, False
        self._inputs: Inputs = {}
        self._replay: Callable[[], None] | None = None

    def __call__(self, work: Work, inputs: Inputs, *, times: int = 1) -> None:
        if self._failed or not _fits(inputs["x"], self._rows, self._side):
            run_plainly(work, inputs, times=times)
        elif not self._warm:
            self._recorder.warm(lambda: run_plainly(work, inputs, times=times))
            self._warm = True
        else:
            if self._replay is None and not self._record(work, inputs):
                run_plainly(work, inputs, times=times)
                return
            assert self._replay is not None, "it was recorded"
            for name, buffer in self._inputs.items():
                buffer.copy_(inputs[name])
            for _ in range(times):
                self._replay()

    def _record(self, work: Work, inputs: Inputs) -> bool:
        try:
            self._inputs = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
            self._replay = self._recorder.record(lambda: work(self._inputs))
        except RuntimeError as error:  # an exhausted memory is one
            self._failed, self._inputs = True, {}
            self._abandon()
            self._report(f"step engine: nothing is captured from here on; recording failed: {_first_line(error)}")
        return not self._failed


def _fits(x: Tensor, rows: int, side: int | None) -> bool:
    return len(x) == rows and side in (None, x.shape[-1])


def _first_line(error: BaseException) -> str:
    error = getattr(error, "inner_exception", error)  # of a compiler's failure, what made it fail
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def build_step_engine(
    config: TrainConfig,
    model: TwoHead,
    bank: Bank | None,
    *,
    report: Report,
    abandon: Callable[[], None],
    name: str | None = None,
    backend: str = "inductor",
    recorder: Recorder | None = None,
    world: World = SOLO,
) -> StepEngine:
    """Build the rung that the configuration asks for; `fused` and `captured` exchange the model's forwards.

    name: another rung than the configuration's, taken without asking whether it can run here. backend, recorder: of
    `compiled` and `captured`.
    """
    objective, method, optim = OBJECTIVES[config.method.objective], config.method, config.optim
    assert optim.batch_size is not None, "the config was not resolved"
    device = next(model.parameters()).device
    reason = "as asked"
    if name is None:
        name, reason = choose_step_engine(config, device, processes=world.size)

    def loss(views: Views) -> Terms:
        return objective(model, views, bank, method, smoothing=optim.smoothing)

    side = config.data.img_size if optim.progressive_size else None
    if name == "compiled":
        rows = -(-world.counts(optim.batch_size)[world.rank] // optim.grad_accum_steps)
        return StepEngine(name, reason, CompiledLoss(loss, rows, report, backend=backend, side=side), run_plainly)
    if name in ("fused", "captured"):
        why = _cannot_fuse(device)
        if why is not None or not fuse_norms(model):
            ghost = "ghost batch norms (--bn-group-size) are no single op"
            none = ghost if config.model.bn_group_size else "the network has none that could be"
            reason += f"; without fused norms: {why or none}"
    if name == "captured":
        recorder = recorder or CudaRecorder(device)
        return StepEngine(name, reason, loss, Captured(recorder, optim.batch_size, report, abandon, side=side))
    return StepEngine(name, reason, loss, run_plainly)


def choose_step_engine(config: TrainConfig, device: torch.device, *, processes: int = 1) -> tuple[str, str]:
    """Return the rung that the configuration means here, and why, in words for people.

    A rung that cannot run here is replaced by the one below it that can, not refused: the result is the same.
    """
    name = config.optim.step_engine
    if name == "auto":
        if device.type == "cuda":
            return "eager", "the others have not been measured on a GPU yet; --step-engine takes one"
        return "eager", "on a CPU no other was faster (ResNet-18 at 112 pixels)"
    asked = f"{name} was asked for, but"
    if name == "compiled" and (why := _cannot_compile(device)) is not None:
        return "eager", f"{asked} {why}"
    if name == "fused" and (why := _cannot_fuse(device)) is not None:
        return "eager", f"{asked} {why}"
    if name == "captured":
        if processes > 1:
            return "fused", f"{asked} what several processes exchange is not recorded"
        if device.type != "cuda":
            return "fused", f"{asked} only a CUDA device records its work"
        if config.attack.replay == 1 and config.optim.grad_accum_steps > 1:
            return "fused", f"{asked} with --grad-accum-steps attacks lie between the parts of a step"
    return name, "as asked"


def _cannot_fuse(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    found = kernels.implementation(device.index or 0)
    return None if found.name == "cuda" else f"its kernels do not run here: {found.reason}"


def _cannot_compile(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "there is no Triton to compile with"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "there is no C++ compiler (g++, or what CXX names)"
    return None
