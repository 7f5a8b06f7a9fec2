"""What people read in an export: the model card, and RobustBench's model_info. Texts only; figures come measured."""

from __future__ import annotations

import re
from typing import Any

from fasttht.config_file import length_text
from fasttht.export import EXACT, HEADER, ONNX, WEIGHTS, WRAPPER
from fasttht.traits import TRAITS

TITLE = "THAT: Two Head Adversarial Training for Improving Robustness at Scale"
AUTHORS = "Zuxuan Wu, Tom Goldstein, Larry S. Davis, Ser-Nam Lim"
LINK = "https://arxiv.org/abs/2103.13612"
NOT_MEASURED = "not measured"

_MAX_NAMES, _MAX_NAME = 50, 60
_ENSEMBLES = {"apgd": "APGD (CE and DLR, the worse)", "autoattack": "AutoAttack, standard"}
_NORMS = {"linf": "Linf", "l2": "L2", "l2-relative": "L2, relative to each image's own norm"}
# What begins something in Markdown, HTML or a link that readers make by themselves.
_SPECIAL = set("\\`*_{}[]<>#|~&$^=:@.!\"'")


def escaped(text: str) -> str:
    """Return foreign text as Markdown that shows it and does nothing else, on one line."""
    return "".join(
        f"&#{ord(char)};" if char in _SPECIAL else char if char.isprintable() else f"&#92;u{ord(char):04x}"
        for char in text[:_MAX_NAME]
    ) + ("..." if len(text) > _MAX_NAME else "")


def radius(header: dict[str, Any]) -> str:
    """Return norm and radius as people write them: `Linf, eps 16/255`."""
    return f"{_NORMS[header['norm']]}, eps {length_text(header['norm'], header['eps'])}"


def model_info(header: dict[str, Any]) -> dict[str, Any]:
    """Return RobustBench's description of an exact export; null is what nobody measured.

    Accuracies are percent, as text with two digits like theirs. `reported` stays null: it is for a paper's claim.
    """
    scores, text = header["scores"], radius(header)
    auto = (header["autoattack"] or {}).get("autoattack")
    said = NOT_MEASURED if auto is None else f"{auto['top1']:.2f} % of {auto['images']} images, by the run's evaluation"
    return {
        "link": LINK if header["objective"].startswith("that") else None,
        "name": TITLE if header["objective"].startswith("that") else f"{header['name']} (trained with fasttht)",
        "authors": None,
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": None,
        "venue": None,
        "architecture": _architecture(header),
        "norm": {"linf": "Linf", "l2": "L2"}.get(header["norm"]),
        "eps": length_text(header["norm"], header["eps"]),
        "clean_acc": f"{scores['clean_top1']:.2f}",
        "reported": None,
        "autoattack_acc": f"{auto['top1']:.2f}" if auto is not None and auto["images"] == scores["held_out"] else None,
        "unreliable": None,
        "footnote": (
            f"Measured on {scores['images']} of {scores['held_out']} held-out images of the training data's own split: "
            f"clean {scores['clean_top1']:.2f} %, PGD-10 ({text}, untargeted) {_pgd(scores):.2f} %. "
            f"AutoAttack: {said}. Authors, data set and venue are for whoever publishes the weights to fill in."
        ),
    }


def card(header: dict[str, Any], *, onnx: bool) -> str:
    """Return the model card of an export of either kind, as Markdown."""
    exact = header["format"] == EXACT
    parts = [_front(), f"# {header['name']}\n", _what(header, exact), _files(header, exact, onnx), _load(header, exact)]
    parts += [_figures(header, exact), _training(header), _uses(header, exact), _classes(header), _sources()]
    return "\n".join(parts)


def _front() -> str:
    return (
        "---\nlibrary_name: pytorch\npipeline_tag: image-classification\n"
        "tags:\n- adversarial-robustness\n- adversarial-training\n---\n"
    )


def _architecture(header: dict[str, Any]) -> str:
    name: str = header["arch"].replace("resnet", "ResNet-")
    extras = [f"width {header['width']}"] if header["width"] != 64 else []
    extras += ["3x3 stem"] if header["stem"] == "small" else []
    extras += ["denoising blocks"] if header["denoise"] else []
    extras += ["mixture BN"] if header["mixture_bn"] else []
    return name + (f" ({', '.join(extras)})" if extras else "")


def _what(header: dict[str, Any], exact: bool) -> str:
    head = {
        "cosine": "a cosine classifier (logits s cos(h, w), no bias)",
        "linear": "a linear classifier",
    }[header["classifier"]]
    feature = "no feature head" if header["feat_dim"] is None else f"a feature head of {header['feat_dim']} dimensions"
    average = ", moving average of the weights" if header["weights"] == "ema" else ""
    against = "trained against" if TRAITS[header["objective"]].attacked else "trained without attack, evaluated under"
    text = (
        f"{_architecture(header)} with {head} and {feature}, {header['num_classes']} classes, "
        f"{header['img_size']}x{header['img_size']} pixels. Objective `{header['objective']}`; {against} "
        f"{radius(header)}. Exported by fasttht {header['fasttht']} from step {header['step']}{average}.\n"
    )
    if exact:
        branch = " Images take the adversarial BN branch." if header["mixture_bn"] else ""
        return text + (
            "\nThis is the exact export: the logits are those of the run's own evaluation. Inputs are pixels in "
            f"[0, 1]; mean and deviation are inside.{branch}\n"
        )
    scaled = "its logits are scaled image by image (by the length of the feature), and so are its gradients"
    why = scaled if header["classifier"] == "cosine" else "normalisation is left to the caller and the feature head out"
    return text + (
        f"\n**Not for attack evaluation.** This export has torchvision's keys: the predicted class is that of the "
        f"trained network, but {why}. Accuracy under attack must be measured on an exact export "
        "(`fasttht export --kind exact`).\n"
    )


def _files(header: dict[str, Any], exact: bool, onnx: bool) -> str:
    rows = [
        f"- `{WEIGHTS}`: the weights, sha256 `{header['sha256']}`",
        f"- `{HEADER}`: what this card says, for programs",
    ]
    if exact:
        rows += [
            f"- `{WRAPPER}`: the network for those without fasttht; needs torch and safetensors",
            f"- `{header['name']}.json`: RobustBench's model_info; null is what was not measured",
        ]
    if onnx:
        found = header["checks"]["onnx"]
        shape = f"(B, 3, {header['img_size']}, {header['img_size']})"
        rows.append(
            f"- `{ONNX}`: input `pixels` {shape} in [0, 1], output `logits`; within {found['max_difference']:.1e} of "
            f"the network on {found['images']} held-out images (onnxruntime, CPU)"
        )
    return "## Files\n\n" + "\n".join(rows) + "\n"


def _load(header: dict[str, Any], exact: bool) -> str:
    size = header["img_size"]
    if exact:
        code = (
            "import sys, torch\n"
            'sys.path.insert(0, "path/to/this/folder")\n'
            "from model import load\n"
            "model = load()\n"
            f"logits = model(torch.rand(1, 3, {size}, {size}))  # pixels in [0, 1]\n"
        )
        note = (
            f"Images as they were evaluated: the central {header['crop_pct']:.0%} of the short side, scaled to {size} "
            "pixels. RobustBench's `benchmark` and attack libraries take the model as it is (bounds 0 and 1).\n"
        )
    else:
        code = (
            "import torchvision\n"
            "from safetensors.torch import load_file\n"
            f"model = torchvision.models.{header['arch']}(num_classes={header['num_classes']})\n"
            'model.load_state_dict(load_file("path/to/this/folder/model.safetensors"))\n'
            "model.eval()  # inputs: (pixels in [0, 1] - mean) / std\n"
        )
        note = (
            f"Normalise inputs with ImageNet's mean {header['mean']} and standard deviation {header['std']}, as for "
            "torchvision's own weights; the network does not do it.\n"
        )
    return f"## How to load\n\n```python\n{code}```\n\n{note}"


def _figures(header: dict[str, Any], exact: bool) -> str:
    scores, run = header["scores"], header["run_scores"]
    rows = [("clean", scores["clean_top1"], scores["images"], "this export")]
    if exact:
        steps = f"PGD-10, untargeted, one random start, {radius(header)}, step size {scores['alpha']:.4g}"
        rows.append((steps, _pgd(scores), scores["images"], "this export"))
    for key, value in (run or {}).items() if exact else ():
        again = key in scores and scores["images"] == run["images"]  # the same images, attacked alike
        if key.endswith("_top1") and not again:
            rows.append((_named(key), value, run["images"], "the run's end"))
    measured = (header["autoattack"] or {}) if exact else {}
    for name, words in _ENSEMBLES.items():
        if name in measured:
            one = measured[name]
            rows.append((f"{words}, {radius(header)}", one["top1"], one["images"], "the run's evaluation"))
    lines = [f"| {what} | {value:.2f} | {images} | {where} |" for what, value, images, where in rows]
    unknown = ["common corruptions", "other norms and radii"] if exact else ["under attack"]
    if exact and "autoattack" not in measured:
        unknown.insert(0, "AutoAttack" if "apgd" in measured else "APGD and AutoAttack")
    lines += [f"| {what} | {NOT_MEASURED} | | |" for what in unknown]
    few = "" if scores["images"] == scores["held_out"] else (
        f" {scores['images']} of {scores['held_out']} held-out images were taken, evenly spaced."
    )  # fmt: skip
    return (
        "## Figures\n\n| images | top-1 % | n | measured on |\n|---|---|---|---|\n"
        + "\n".join(lines)
        + f"\n\nHeld-out split of the training data, seed {header['seed']}, float32.{few}"
        + (" A cosine classifier can make PGD look weaker than it is: judge by AutoAttack." if exact else "")
        + "\n"
    )


def _named(key: str) -> str:
    """Return what a column of metrics.jsonl is called in a table: `PGD-50 targeted`."""
    return re.sub(r"^pgd(\d+)", r"PGD-\1", key.removesuffix("_top1").replace("_", " "))


def _training(header: dict[str, Any]) -> str:
    lines = [f"{key} = {value!r}" for key, value in header["recipe"].items()]
    data = header["data"]
    text = (
        f"Data: {data['name']}, {data['train_images']} training images, {data['held_out_images']} held out "
        f"(fingerprints `{data['train']}` and `{data['held_out']}`). Options of `fasttht train`:"
    )
    return f"## Training\n\n{text}\n\n```\n" + "\n".join(lines) + "\n```\n"


def _uses(header: dict[str, Any], exact: bool) -> str:
    limits = [
        f"Robustness, where there is any, is to {_NORMS[header['norm']]} perturbations of the size above; to others it "
        "is not known.",
        "Figures under PGD are upper bounds: a stronger attack can only lower them.",
        "Images unlike the training data, and classes it did not hold, get a confident answer all the same.",
    ]
    if not exact:
        limits.insert(0, "Not for attack evaluation: see above.")
    return (
        "## Intended use and limits\n\nResearch on adversarial robustness, and as initial weights. Not for decisions "
        "about people, nor where a wrong class does harm.\n\n" + "\n".join(f"- {text}" for text in limits) + "\n\n"
        "## Licence\n\nThe weights are whose training run this was, and follow the terms of the training data; this "
        "card grants nothing. fasttht" + (f" and `{WRAPPER}` are" if exact else " is") + " under the MIT licence.\n"
    )


def _classes(header: dict[str, Any]) -> str:
    names = header["class_names"]
    if names is None:
        return f"## Classes\n\n{header['num_classes']}, without names.\n"
    rows = [f"- {i} {escaped(name)}" for i, name in enumerate(names[:_MAX_NAMES])]
    more = len(names) - _MAX_NAMES
    if more > 0:
        rows.append(f"- and {more} more, in `{HEADER}`")
    return "## Classes\n\n" + "\n".join(rows) + "\n"


def _sources() -> str:
    return (
        "## Source\n\n```bibtex\n@article{wu2021that,\n"
        f"  title   = {{{{{TITLE}}}}},\n  author  = {{{AUTHORS.replace(', ', ' and ')}}},\n"
        "  journal = {arXiv preprint arXiv:2103.13612},\n  year    = {2021}\n}\n```\n"
    )


def _pgd(scores: dict[str, Any]) -> float:
    value: float = next(scores[key] for key in scores if key.startswith("pgd10"))
    return value
