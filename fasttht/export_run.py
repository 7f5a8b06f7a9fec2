"""From a run folder to an exported one: written under another name, read back, compared with the run, then kept."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import fasttht
from fasttht import checkpoint, export_check, log
from fasttht.attacks.auto_results import digest
from fasttht.config import TrainConfig
from fasttht.config_file import identity
from fasttht.errors import UsageError
from fasttht.eval_files import kept_rows
from fasttht.export import CARD, EXACT, HEADER, ONNX, TORCHVISION, WEIGHTS, WRAPPER, is_export, read_export, sha256
from fasttht.export_card import card, model_info
from fasttht.export_onnx import open_onnx, require_onnx, write_onnx
from fasttht.export_torchvision import check_known, read_torchvision, torchvision_tensors
from fasttht.models import standalone
from fasttht.models.two_head import MEAN, STD
from fasttht.run_folder import RunFolder
from fasttht.subject import Subject, open_run
from fasttht.traits import TRAITS

# Where a file or folder lies is nobody's business but the exporter's.
_PATHS = ("data", "init")


def export_run(
    path: Path,
    *,
    which: str = "last",
    output: Path | None = None,
    kind: Literal["exact", "torchvision"] = "exact",
    onnx: bool = False,
    name: str | None = None,
    limit: int = 0,
    force: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Export a run's checkpoint (`which`, as `resuming.choose` has it); return model.json's content.

    Written to OUTPUT.partial, read back as anyone would read it, compared with the run's network on held-out images
    (limit: so many, evenly spaced; 0: all) and renamed only then. Whatever goes wrong, nothing of it stays, and an
    export that was there is as it was.

    Raises: UsageError for what cannot be exported, or an output that is there (unless `force` and it is an export);
    CheckpointError if what was read back differs; OSError from the disk; else as open_run does.
    """
    config = RunFolder(path).config()
    if limit < 0:
        raise UsageError(f"--limit: expected a number of images, or 0 for all, got {limit}")
    if onnx:
        if kind != "exact":
            raise UsageError(f"--onnx: expected it with --kind exact, got --kind {kind}; export twice")
        require_onnx()
    if kind == "torchvision":
        check_known(config)
    name = _checked_name(name or f"{config.model.arch}-{config.method.objective}")
    output = output or path / "export" / kind
    _check_output(output, force)
    subject = open_run(path, config, which=which, device=device)
    rows = export_check.chosen_rows(len(subject.splits.val), limit)
    with _partial(output) as folder, log.Screen("export", len(rows), "images") as screen:
        header = _header(subject, kind, name)
        if kind == "exact":
            _write_exact(subject, folder, header, onnx, rows, screen.advance)
        else:
            _write_torchvision(subject, folder, header, rows, screen.advance)
        write_text(folder / CARD, card(header, onnx=onnx))
        write_json(folder / HEADER, header)
        (read_export if kind == "exact" else read_torchvision)(folder)
    scores = header["scores"]
    log.scores(f"{subject.title}, exported: {scores['images']} held-out images", scores)
    log.say(f"export: {output} ({kind}{', with ONNX' if onnx else ''})")
    return header


def _write_exact(
    subject: Subject,
    folder: Path,
    header: dict[str, Any],
    onnx: bool,
    rows: Tensor,
    on_batch: Callable[[int], None],
) -> None:
    """Write everything but the card, read it back, compare, and write the scores into `header`, in place."""
    tensors = dict(subject.model.state_dict())
    write_weights(folder / WEIGHTS, tensors)
    header["sha256"] = sha256(folder / WEIGHTS)
    write_json(folder / HEADER, header)
    write_text(folder / WRAPPER, inspect.getsource(standalone))
    exported, _ = read_export(folder)
    export_check.check_tensors(tensors, dict(exported.state_dict()))
    wrapper, run_onnx = standalone.load(folder), None
    if onnx:
        write_onnx(wrapper, header["img_size"], folder / ONNX)
        run_onnx = open_onnx(folder / ONNX)
    tally = export_check.compare_exact(subject, exported, wrapper, run_onnx, rows, on_batch)
    header["scores"] = export_check.figures(tally, len(subject.splits.val), export_check.threat_of(subject))
    header["checks"] = {"max_logit_difference": tally.logits, "max_wrapper_difference": tally.wrapper}
    if onnx:
        header["checks"]["onnx"] = {"max_difference": tally.onnx, "images": tally.onnx_images}
    write_json(folder / f"{header['name']}.json", model_info(header))


def _write_torchvision(
    subject: Subject, folder: Path, header: dict[str, Any], rows: Tensor, on_batch: Callable[[int], None]
) -> None:
    """Write the weights, read them back, compare, and write the score into `header`, in place."""
    tensors = torchvision_tensors(subject.model)
    write_weights(folder / WEIGHTS, tensors, {"attack_evaluation": "no"})
    header["sha256"] = sha256(folder / WEIGHTS)
    write_json(folder / HEADER, header)
    exported, _ = read_torchvision(folder)
    export_check.check_tensors(tensors, torchvision_tensors(exported))
    tally = export_check.compare_predictions(subject, exported, rows, on_batch)
    header["scores"] = export_check.figures(tally, len(subject.splits.val), None)
    header["checks"] = {"ties": tally.ties}


def _header(subject: Subject, kind: str, name: str) -> dict[str, Any]:
    """Return model.json but for the weights' sha256 and the scores."""
    config, splits = subject.config, subject.splits
    model, traits = config.model, TRAITS[config.method.objective]
    names, exact = splits.train.class_names, kind == "exact"
    final = RunFolder(subject.path).final()
    step = int(checkpoint.read_meta(subject.path / checkpoint.FOLDER / subject.checkpoint)["step"])
    return {
        "format": EXACT if exact else TORCHVISION,
        "name": name,
        "attack_evaluation": exact,
        "arch": model.arch,
        "stem": model.stem,
        "width": model.width,
        "classifier": model.classifier,
        "feat_dim": model.feat_dim if traits.has_feature_head and exact else None,
        "num_classes": splits.num_classes,
        "class_names": list(names) if len(names) == splits.num_classes else None,
        "img_size": config.data.img_size,
        "crop_pct": config.data.crop_pct,
        "denoise": model.denoise,
        "mixture_bn": traits.mixture_bn,
        "norm": config.attack.norm,
        "eps": config.attack.eps,
        "mean": list(MEAN),
        "std": list(STD),
        "fasttht": fasttht.__version__,
        "objective": config.method.objective,
        "step": step,
        "weights": subject.weights,
        "seed": config.run.seed,
        "data": {
            "name": "a data set of the exporter's"
            if config.data.data
            else "the embedded handwritten digits (CC BY 4.0)",
            "train": splits.train.fingerprint,
            "train_images": len(splits.train),
            "held_out": splits.val.fingerprint,
            "held_out_images": len(splits.val),
        },
        "recipe": _recipe(config),
        "scores": {},
        "run_scores": None if final is None or final["step"] != step else _scores(final),
        "autoattack": _autoattack(subject),
    }


def _autoattack(subject: Subject) -> dict[str, Any] | None:
    """Return what the run's kept evaluations say of APGD and AutoAttack on this very network, of most images; or None.

    It must be the same network, images and threat: names of checkpoints come again when a run is trained anew.
    """
    config = subject.config
    same = {
        "network": digest(subject.model)[:16], "data": subject.splits.val.fingerprint,
        "img_size": config.data.img_size, "crop_pct": config.data.crop_pct,
        "norm": config.attack.norm, "eps": config.attack.eps,
    }  # fmt: skip
    found: dict[str, Any] = {}
    try:
        for _, row in kept_rows(subject.path):
            if any(row.get(key) != value for key, value in same.items()):
                continue
            for name in ("apgd", "autoattack"):
                top1 = row.get(f"{name}{'_l2' if config.attack.norm == 'l2' else ''}_top1")
                if top1 is not None and row["images"] >= found.get(name, {"images": 0})["images"]:
                    found[name] = {"top1": top1, "images": row["images"]}
    except UsageError as error:
        log.say(f"{error}; APGD and AutoAttack count as not measured")
        return None
    return found or None


def _recipe(config: TrainConfig) -> dict[str, Any]:
    """Return the options that decide what the run computed, without the paths among them."""
    options = {key: value for key, value in identity(config).items() if key not in _PATHS and value is not None}
    if options.get("clean_encoder") not in (None, "momentum"):
        options["clean_encoder"] = "frozen, from a file or run"
    return options | ({"init": "from a file or run"} if config.model.init is not None else {})


def _scores(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key == "images" or key.endswith("_top1")}


def _checked_name(name: str) -> str:
    # model.json and model.py are taken; a name is also a file's
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", name) or name.lower() == "model":
        raise UsageError(f"--name: expected up to 80 letters, digits, - and _, other than `model`, got {name[:80]!a}")
    return name


def _check_output(output: Path, force: bool) -> None:
    """Refuse what is there. Raises: UsageError."""
    for path in (output, _partial_name(output)):
        if not os.path.lexists(path):
            continue
        if not force:
            why = "there already" if path == output else "left by an export that was killed, or still running"
            raise UsageError(f"--output: expected a new folder, got {path}: {why}; --force replaces it")
        known = (
            path.is_dir() and not path.is_symlink() and (is_export(path) or path != output or not any(path.iterdir()))
        )
        if not known:
            raise UsageError(f"--output: expected a new folder or an export to replace, got {path}, which is neither")


def _partial_name(output: Path) -> Path:
    return output.absolute().with_name(f"{output.absolute().name}.partial")


@contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """Give a folder to write, and put it in `output`'s place when all went well; else leave nothing of it."""
    partial, output = _partial_name(output), output.absolute()
    created = [path for path in output.parents if not path.exists()]
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.iterdir(), partial]:
            checkpoint.sync(path)
        if output.exists():
            replaced = output.with_name(f".{output.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)  # left by an export that was killed here
            output.rename(replaced)
            try:
                partial.rename(output)
            except OSError:
                replaced.rename(output)
                raise
            shutil.rmtree(replaced)
        else:
            partial.rename(output)
        checkpoint.sync(output.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # not empty: somebody else's by now
            for path in created:
                path.rmdir()
        raise


def write_weights(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors contiguous, on the CPU. Raises: OSError if the disk does not take them."""
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, file, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(file)) from None
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes it its owner's alone


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write JSON of ASCII characters only, whatever is in its texts."""
    write_text(file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write UTF-8."""
    file.write_text(text, encoding="utf-8")
