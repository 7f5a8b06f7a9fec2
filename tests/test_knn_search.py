"""The search and the vote against sorted lists and sums in NumPy."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttht.errors import UsageError
from fasttht.knn_search import TEMPERATURE, Weighting, confidences, finder, nearest, vote

Case = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], int]


WEIGHTINGS = st.sampled_from(["similarity", "exponential"])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Queries, known features, labels and k; features of eighths, whose products are exact, so that many are equal."""
    known_count, dim = draw(st.integers(1, 24)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.integers(0, 4))
    queries = rng.integers(-levels, levels + 1, (draw(st.integers(1, 7)), dim)) / 8
    known = rng.integers(-levels, levels + 1, (known_count, dim)) / 8
    return (
        queries,
        known,
        rng.integers(0, 4, known_count),
        draw(st.sampled_from([1, known_count, (known_count + 1) // 2])),
    )


def brute(queries: np.ndarray[Any, Any], known: np.ndarray[Any, Any], k: int) -> list[list[int]]:
    """Rows of the k largest products; of equal ones the lower row."""
    return [sorted(range(len(known)), key=lambda j: (-float(row @ known[j]), j))[:k] for row in queries]


@settings(max_examples=150, deadline=None)
@given(
    case=cases(),
    query_rows=st.integers(1, 8),
    known_rows=st.integers(1, 30),
    weighting=WEIGHTINGS,
)
def test_search_and_vote_are_those_of_sorting_everything(
    case: Case, query_rows: int, known_rows: int, weighting: Weighting
) -> None:
    queries, known, labels, k = case
    q, v = torch.from_numpy(queries).float(), torch.from_numpy(known).float()
    similarity, rows = nearest(q, v, k, query_rows=query_rows, known_rows=known_rows)
    expected = brute(queries, known, k)
    assert rows.tolist() == expected
    products = [[float(query @ known[j]) for j in line] for query, line in zip(queries, expected, strict=True)]
    assert similarity.tolist() == products
    votes = np.zeros((len(queries), 4))
    for i, line in enumerate(expected):
        for j, s in zip(line, products[i], strict=True):
            votes[i, labels[j]] += s if weighting == "similarity" else np.exp(s / TEMPERATURE)
    found = confidences(similarity, torch.from_numpy(labels)[rows], 4, weighting)
    np.testing.assert_allclose(found.numpy(), votes, rtol=1e-12)
    if weighting == "similarity":  # sums of eighths are exact
        chosen = vote(q, v, torch.from_numpy(labels), k=k, num_classes=4)
        assert chosen.tolist() == votes.argmax(axis=1).tolist()


def test_a_class_without_a_neighbour_comes_before_one_whose_neighbours_point_away() -> None:
    similarity, classes = torch.tensor([[-0.25, -0.5]]), torch.tensor([[0, 2]])
    assert confidences(similarity, classes, 3).tolist() == [[-0.25, 0.0, -0.5]]
    assert confidences(similarity, classes, 3, "exponential").argmax() == 0


def test_the_exponential_weight_lets_one_near_neighbour_outvote_many_far_ones() -> None:
    similarity, classes = torch.tensor([[0.9, 0.4, 0.4, 0.4]]), torch.tensor([[1, 0, 0, 0]])
    assert confidences(similarity, classes, 2).argmax() == 0
    assert confidences(similarity, classes, 2, "exponential").argmax() == 1


def test_unit_features_give_the_same_neighbours_for_any_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, known = (
        torch.nn.functional.normalize(torch.randn(count, 16, generator=generator, dtype=torch.float64), dim=1)
        for count in (40, 500)
    )
    expected = brute(queries.numpy(), known.numpy(), 50)
    for query_rows, known_rows in ((256, 65536), (7, 33), (40, 500), (1, 49)):
        similarity, rows = nearest(queries, known, 50, query_rows=query_rows, known_rows=known_rows)
        assert rows.tolist() == expected
        torch.testing.assert_close(similarity, (queries[:, None] * known[rows]).sum(dim=2))


@pytest.mark.parametrize("k", [0, 6, -1])
def test_more_neighbours_than_the_bank_holds_are_refused(k: int) -> None:
    with pytest.raises(UsageError, match=rf"--knn-k: expected 1 to 5, the number of training images, got {k}"):
        nearest(torch.zeros(2, 3), torch.zeros(5, 3), k)


def test_faiss_without_its_package_is_refused_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match=r"--knn-search.*pip install faiss-cpu"):
        nearest(torch.zeros(2, 3), torch.zeros(5, 3), 2, search="faiss")


class FlatIP:
    """What faiss.IndexFlatIP does, with its types and its refusal of anything but contiguous float32."""

    def __init__(self, dim: int) -> None:
        self.known = np.zeros((0, dim), dtype=np.float32)

    def add(self, known: np.ndarray[Any, Any]) -> None:
        assert known.dtype == np.float32
        assert known.flags.c_contiguous
        self.known = np.concatenate([self.known, known])

    def search(self, queries: np.ndarray[Any, Any], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        assert queries.dtype == np.float32
        products = queries @ self.known.T
        rows = np.argsort(-products, axis=1)[:, :k]
        return np.take_along_axis(products, rows, axis=1), rows.astype(np.int64)


def test_faiss_finds_what_the_exact_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("faiss") is None:
        monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(IndexFlatIP=FlatIP))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    queries, known = (torch.randn(count, 8, generator=generator) for count in (20, 100))
    built: list[Any] = []
    index = sys.modules["faiss"].IndexFlatIP if "faiss" in sys.modules else importlib.import_module("faiss").IndexFlatIP
    monkeypatch.setattr("faiss.IndexFlatIP", lambda dim: (built.append(dim), index(dim))[1])
    find = finder(known, search="faiss", query_rows=6)
    similarity, rows = find(queries, 9)
    assert torch.equal(find(queries[:3], 9)[1], rows[:3])
    assert built == [8]  # a bank of a million features is not copied for every batch
    expected = nearest(queries, known, 9)
    assert torch.equal(rows, expected[1])
    torch.testing.assert_close(similarity, expected[0])
