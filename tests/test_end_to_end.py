"""The main job, shortened: the numbers of the whole quickstart stand in the README with their command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fasttht import cli


def train(folder: Path, *words: str) -> dict[str, Any]:
    assert cli.run(["train", *words, "--output", str(folder)]) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kind"] == "final"
    return {"final": rows[-1], "train": [row for row in rows if row["kind"] == "train"]}


@pytest.mark.slow
def test_free_training_makes_a_robust_network_and_clean_training_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer epochs than the quickstart's; the gap between the two networks is what must be there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    robust = train(tmp_path / "robust", "--replay", "4", "--epochs", "24")
    clean = train(tmp_path / "clean", "--objective", "clean", "--epochs", "12")
    assert clean["final"]["clean_top1"] > 90
    assert robust["final"]["clean_top1"] > 90
    assert robust["final"]["pgd10_top1"] > 45
    assert clean["final"]["pgd10_top1"] < 20
    assert robust["final"]["pgd10_top1"] - robust["final"]["pgd50_top1"] < 5
    first, last = robust["train"][0], robust["train"][-1]
    assert last["loss_cl"] < math.log(1 + 1024) - 2  # far better than telling the twin from the bank by chance
    assert last["loss_cls"] < first["loss_cls"]
    assert last["skipped_steps"] == 0
    assert last["logit_scale"] != 16, "eta is learnt"
    for name in ("config.toml", "env.json", "metrics.jsonl", "timing.jsonl", "summary.csv", "checkpoints"):
        assert (tmp_path / "robust" / name).exists()
    assert {"img_per_s", "data_wait_pct"} <= json.loads(
        (tmp_path / "robust/timing.jsonl").read_text().splitlines()[0]
    ).keys()
