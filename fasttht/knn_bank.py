"""The bank of the nearest-neighbour defence: the clean feature of every training image, built once and kept.

    RUN/knn/<fingerprint>.safetensors

Of what is no run folder, and may be meant for others, it lies in a cache folder. The name is a digest of what the
features depend on: weights, images and transform. The file holds the sha256 of its features, is written under another
name, synced and renamed; one that is damaged is built anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fasttht import checkpoint
from fasttht.attacks.pgd import evaluating
from fasttht.build import build_clean_encoder
from fasttht.distributed import SOLO, World
from fasttht.errors import CheckpointError, UsageError
from fasttht.knn_search import encoded
from fasttht.meeting import Meeting
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.models.two_head import TwoHead, at_least_float32
from fasttht.pipelines.cache import cache_folder
from fasttht.precision import full_precision
from fasttht.signals import Stop
from fasttht.subject import Subject, images
from fasttht.traits import TRAITS

Kind = Literal["head", "trunk"]
# Whose clean features the bank holds: g is the clean encoder, f the network itself.
Source = Literal["momentum g", "frozen g", "f"]
FOLDER = "knn"
PROGRESS_S = 30.0
_VERSION = 1


@dataclass(frozen=True)
class FeatureIndex:
    """Features (N, D) float of unit norm by training row and labels (N,), on the subject's device.

    network is what gave them, `title` what people call it; `encode` gives the feature of other images likewise.
    """

    features: Tensor
    labels: Tensor
    network: nn.Module
    encode: Callable[[Tensor], Tensor]
    title: str

    def prototypes(self, num_classes: int) -> Tensor:
        """Return the direction of each class's mean feature, (C, D) of unit norm, zero for a class without images."""
        sums = torch.zeros(num_classes, self.features.shape[1], dtype=torch.float64, device=self.features.device)
        sums.index_add_(0, self.labels, self.features.double())  # float64: on a GPU the order of a sum is not fixed
        return F.normalize(sums, dim=1).to(self.features.dtype)


def encoder_of(network: TwoHead | CleanEncoder, kind: Kind) -> Callable[[Tensor], Tensor]:
    """Return the function from pixels (B, 3, H, W) to unit features: the head's, or the pooled ones of the trunk.

    Raises: UsageError for the head of a network without one.
    """
    head = network.feature_head
    if kind == "trunk":
        return lambda x: F.normalize(at_least_float32(network.trunk(network.normalize(x))), dim=1)
    if head is None:
        raise UsageError("--knn-features: expected trunk, as this network has no feature head, got head")
    return lambda x: head(network.trunk(network.normalize(x)))


def bank_source(subject: Subject, kind: Kind) -> tuple[Source, str]:
    """Return whose clean features are the bank, and that in words.

    For the head that is g, which f's head was trained to agree with. Of the trunks nothing was trained to agree: with a
    momentum g they are alike, as g is an average of f's own weights; a frozen g is another network, whose pooled
    features have other axes than f's, and a cosine between the two means nothing: on the digits such a bank named 9 %
    of the clean images, as chance does, and f's own 99 %. There, and for objectives without g, the bank is f's own, as
    in Dubey et al.'s web-scale defence, where one network gives both. With mixture BN the bank takes f's adversarial
    branch, as the queries do: features of two branches are two networks' again. What is no run folder holds no g, of
    whatever objective, and its bank is f's own too.
    """
    method = subject.config.method
    if subject.origin != "run":
        what = "an export" if subject.origin == "export" else "a file of weights"
        return "f", f"the network itself, as {what} holds no clean encoder"
    if not TRAITS[method.objective].has_clean_encoder:
        return "f", "the network itself, as its objective has no clean encoder"
    if method.clean_encoder == "momentum":
        return "momentum g", "the momentum clean encoder"
    if kind == "trunk":
        return "f", "the network itself, as the frozen clean encoder's trunk has other axes"
    return "frozen g", "the frozen clean encoder"


def bank_network(subject: Subject, kind: Kind) -> TwoHead | CleanEncoder:
    """Return the network that `bank_source` names.

    Raises: CheckpointError if the momentum encoder cannot be read; UsageError, CheckpointError if the frozen one
    cannot.
    """
    source, _ = bank_source(subject, kind)
    if source == "f":
        return subject.model
    if source == "frozen g":
        frozen = build_clean_encoder(subject.config, subject.model)
        assert frozen is not None, "the objective has a clean encoder"
        return frozen
    folder = subject.path / checkpoint.FOLDER / subject.checkpoint
    if not (folder / "clean_encoder.safetensors").exists():
        raise CheckpointError(
            f"{subject.path}: expected a run folder whose checkpoint holds the momentum clean encoder, got none in "
            f"{subject.checkpoint}; the nearest-neighbour defence needs it"
        )
    momentum = CleanEncoder(subject.model, frozen=False)
    checkpoint.restore(folder, {"clean_encoder": dict(momentum.state_dict())})
    return momentum


def open_index(
    subject: Subject,
    kind: Kind,
    say: Callable[[str], None],
    folder: Path | None = None,
    *,
    world: World = SOLO,
    stop: Stop | None = None,
) -> FeatureIndex:
    """Return the bank of the subject's training images, from `folder` if it is there and whole, else built and kept.

    folder: by default RUN/knn, and a cache folder for what is no run. Where it cannot be written, the bank is built
    each time. say: told in a line of what was done. world: the processes that open it together; where one of them does
    not find it, each encodes a part. stop: what a signal is noted in, at which all of them leave.

    Raises: what bank_network does; CheckpointError for features that are not finite; DataError for an image that cannot
    be read; Stopped.
    """
    encoder_of(subject.model, kind)  # refuse before hours of work
    (_, title), network = bank_source(subject, kind), bank_network(subject, kind)
    encode, labels = encoder_of(network, kind), torch.from_numpy(subject.splits.train.labels.copy())
    if folder is None:
        folder = subject.path / FOLDER if subject.origin == "run" else cache_folder(FOLDER)
    file = folder / f"{fingerprint(subject, network, kind)}.safetensors"
    features = _read(file, len(labels), say)
    kept = world.everybodys("kept banks", features is not None)
    if features is None or not all(kept):
        say(f"nearest neighbours: a bank of {len(labels):,} features by {title}")
        with evaluating(network), full_precision():
            features = _together(subject, encode, len(labels), say, world, stop or Stop())
        if not features.isfinite().all():
            raise CheckpointError(f"{subject.path}: expected finite features from {title}, got others; take another")
        if not kept[world.rank] and (world.size == 1 or os.environ["LOCAL_RANK"] == "0"):  # one for each machine
            _write(file, features.cpu(), say)
    return FeatureIndex(features.to(subject.device), labels.to(subject.device), network, encode, title)


def _together(
    subject: Subject,
    encode: Callable[[Tensor], Tensor],
    count: int,
    say: Callable[[str], None],
    world: World,
    stop: Stop,
) -> Tensor:
    """Return the features (count, D) of the training images, of which each rank encodes a part."""
    if count < world.size:  # some would have none
        world = SOLO
    mine = torch.arange(count)[world.rows(count)]
    report = _progress(len(mine), say)
    with Meeting(world, stop, -(-max(world.counts(count)) // subject.config.evaluation.eval_batch_size)) as meeting:

        def done(images: int) -> None:
            report(images)
            meeting.meet()

        own, _ = encoded(encode, images(subject, "train", mine), done)
    return world.gather_rows("bank", own, world.counts(count))


def fingerprint(subject: Subject, network: nn.Module, kind: Kind) -> str:
    """Return a digest of everything the bank depends on but the arithmetic of the device."""
    data = subject.config.data
    words = {
        "version": _VERSION, "images": subject.splits.train.fingerprint, "features": kind, "transform": "centre crop",
        "img_size": data.img_size, "crop_pct": data.crop_pct,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(words, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        if name.split(".")[0] in ("trunk", "feature_head"):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:24]


def _progress(total: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Return what says every so often how far the bank is: lines, as a bar of the caller's may be on the screen."""
    started = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_S:
            last = now
            left = (now - started) * (total - done) / done
            say(f"bank {done:,}/{total:,} images, {left / 60:.0f} min left")

    return report


def _bytes(tensor: Tensor) -> memoryview:
    values: Any = tensor.detach().cpu().contiguous().numpy()
    return memoryview(values.reshape(-1).view("uint8"))


def _read(file: Path, count: int, say: Callable[[str], None]) -> Tensor | None:
    """Return the features of a kept bank; None if there is none, or, with a line, if it is not what was written."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as kept:
            expected = (kept.metadata() or {}).get("sha256", "nothing")
            features: Tensor = kept.get_tensor("features").clone()  # else it is the mapped file
    except (OSError, SafetensorError) as error:
        say(f"{file}: expected a kept bank, got {error}; it is built anew")
        return None
    found = hashlib.sha256(_bytes(features)).hexdigest()
    if found != expected or len(features) != count:
        say(f"{file}: expected {count} features of sha256 {expected[:12]}, got {len(features)} of {found[:12]}; "
            "the bank is built anew")  # fmt: skip
        return None
    return features


def _write(file: Path, features: Tensor, say: Callable[[str], None]) -> None:
    """Keep a bank: whole under its name, or not at all. Processes that build the same one at once all write it."""
    partial = file.with_name(f".partial-{file.stem}-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(_bytes(features)).hexdigest()
        save_file({"features": features.contiguous()}, partial, {"sha256": digest})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        say(f"{file}: expected to keep the bank here, got {error}; it is built anew next time")
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
