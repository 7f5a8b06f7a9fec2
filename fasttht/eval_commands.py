"""The `eval` command: words to a call. No logic, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from fasttht.config import Many, Pixels, TrainConfig
from fasttht.errors import UsageError


def evaluate(
    path: Path,
    /,
    *,
    checkpoint: str = "last",
    eval_steps: Annotated[tuple[int, ...] | None, Many] = None,
    goal: Literal["run", "untargeted", "targeted", "least-likely", "both", "all"] = "run",
    losses: Annotated[tuple[Literal["ce", "margin", "dlr"], ...], Many] = ("ce",),
    eps: Pixels | None = None,
    norm: Literal["linf", "l2", "l2-relative"] | None = None,
    eps_sweep: Annotated[tuple[Pixels, ...], Many] = (),
    eval_rule: Literal["ratio", "paper"] | None = None,
    eval_restarts: int | None = None,
    suites: Annotated[tuple[Literal["apgd", "autoattack", "knn"], ...], Many] = (),
    knn_k: int = 50,
    knn_weighting: Literal["similarity", "exponential"] = "similarity",
    knn_features: Literal["head", "trunk"] = "head",
    knn_search: Literal["exact", "faiss"] = "exact",
    alarms: Literal["off", "cheap", "full"] = "cheap",
    data: Path | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    limit: int | None = None,
    images_file: Path | None = None,
    seed: int | None = None,
    eval_batch_size: int | None = None,
    output: Path | None = None,
    csv: Path | None = None,
    per_image: Path | None = None,
    work_dir: Path | None = None,
    device: str = "auto",
    dist_timeout: float = 600.0,
) -> int:
    """Evaluate a trained network on clean and attacked held-out images.

    Every image counts once; random starts and targets depend on the image only, not on the batch size.

    Parameters
    ----------
    path
        Run folder, exported folder, or a safetensors or PyTorch file of a ResNet's weights with
        torchvision's names or ours.
    checkpoint
        Which of a run's: last, best (the highest lowest accuracy in an evaluation while it trained), or one's name.
    eval_steps
        PGD lengths. Default: the run's own.
    goal
        Attack goals. run: untargeted, and targeted too if the run trained against that; targeted: at a random other
        class; least-likely: at the class of the lowest logit; both: untargeted and targeted; all: all three.
    losses
        What the attacks move along. margin: the best wrong logit minus the label's; dlr: that over a difference of
        logits, so that their scale does not count.
    eps
        Radius of the ball. Default: the run's own; for another --norm that norm's default. A file needs it.
    norm
        Norm of the ball. l2-relative: eps times each image's own l2 norm (Table 4). Default: the run's own.
    eps_sweep
        Other radii that all PGD attacks are done at as well, as pgd10_eps0.031373.
    eval_rule
        Step size for K steps. ratio: 2.5 eps/K; paper: max(1/255, eps/K), in l2 eps/K. Default: the run's own.
    eval_restarts
        Random starts per attack; above 1 the worst of them for each image is reported as well. Default: the run's own.
    suites
        Further evaluations: Auto-PGD, the whole of AutoAttack (the `eval` extra), and the nearest-neighbour defence,
        under every PGD on the cross entropy that is asked for.
    knn_k
        Neighbours that vote.
    knn_weighting
        Weight of a vote. similarity: the dot product (Eq. 8); exponential: exp of it over 0.07.
    knn_features
        Which features neighbours are near in: the feature head's, or the trunk's.
    knn_search
        exact: every product, on the device; faiss: its exact index, on the CPU (pip install faiss-cpu).
    alarms
        Say what looks like masked gradients. cheap: by the attacks that are done anyway; full: with a few more for it,
        mostly one with five times the longest's steps.
    data
        Folder with train.beton and val.beton, or an image tree. Default: the run's own, for a file the embedded digits.
    img_size
        Side of the images, in pixels. Default: the run's own, or 224.
    crop_pct
        Share of the short side kept by the centre crop. Default: the run's own, or 0.875.
    limit
        Evaluate this many images only, drawn with --seed; a smaller subset is part of a larger one.
    images_file
        Evaluate the images of this list only: a row number, or a path in the data or the end of one, on each line.
    seed
        Seed of starts, targets and --limit. Default: the run's own, or 0.
    eval_batch_size
        Images per batch. Default: the run's own.
    output
        Also append the row as one JSON line to this file. A run's rows are appended to eval/evaluations.jsonl in its
        folder in any case, which plot report shows.
    csv
        Also append one line for each attack to this file.
    per_image
        Also write which images were right to this file, a NumPy archive with a bool for each image under each attack.
    work_dir
        Where suites keep what they have, to go on after a stop, and knn its bank. Default: eval and knn in the run
        folder; for anything else a folder beside it, and for the bank a cache folder.
    device
        cpu, cuda or cuda:N; auto: cuda if there is one, else cpu.
    dist_timeout
        Of several processes: seconds that one may keep the others waiting, after which all end and name it. They wait
        for each other after every batch, with AutoAttack for up to two chunks of 64 images.
    """
    if not dist_timeout > 0:
        raise UsageError(f"--dist-timeout: expected a positive number of seconds, got {dist_timeout:g}")
    from fasttht.build import open_device
    from fasttht.distributed import open_world
    from fasttht.evaluate import Request, evaluate_run

    settings = {
        "eval_steps": eval_steps, "eval_rule": eval_rule, "eval_restarts": eval_restarts,
        "eval_batch_size": eval_batch_size, "data": data, "img_size": img_size, "crop_pct": crop_pct, "seed": seed,
    }  # fmt: skip
    request = Request(
        losses=losses, eps_sweep=eps_sweep, limit=limit, images_file=images_file, csv=csv, suites=suites,
        work_dir=work_dir, knn_k=knn_k, knn_weighting=knn_weighting, knn_features=knn_features, knn_search=knn_search,
        alarms=alarms,
    )  # fmt: skip
    changes = {name: value for name, value in settings.items() if value is not None}
    here = TrainConfig()
    here.run.device = device
    with open_world(open_device(here, several=True), timeout_s=dist_timeout) as world:
        evaluate_run(
            path, changes=changes, goal=goal, which=checkpoint, eps=eps, norm=norm, output=output,
            per_image=per_image, device=device, request=request, world=world,
        )  # fmt: skip
    return 0
