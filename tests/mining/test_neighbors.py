"""Neighbors against the definition: all products, the query left out by its row, ties by row."""

import logging

import faiss
import numpy as np
import pytest

from orl_fast.errors import DataError
from orl_fast.mining import neighbors
from orl_fast.mining.neighbors import find_neighbors


def brute_force(features, num_neighbors):
    products = features.astype(np.float64) @ features.astype(np.float64).T
    np.fill_diagonal(products, -np.inf)
    order = np.lexsort((np.broadcast_to(np.arange(len(features)), products.shape), -products), axis=1)[:, :num_neighbors]
    return order, np.take_along_axis(products, order, axis=1)


def random_features(rng, num, dim=24):
    features = rng.normal(size=(num, dim)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def integer_features(rng, num, dim=24):
    """Products of small integers are exact in whatever order they are summed, so equal ones tie on every machine."""
    features = rng.integers(-9, 10, size=(num, dim)).astype(np.float32)
    features[100:112] = features[7]
    features[200:400:3] = features[rng.integers(0, 100, 67)]
    return features


def joined(blocks):
    blocks = list(blocks)
    return np.concatenate([b.neighbors for b in blocks]), np.concatenate([b.similarities for b in blocks])


@pytest.mark.parametrize("num_neighbors", [1, 10])
@pytest.mark.parametrize("small_blocks", [False, True])
def test_neighbors_are_those_of_all_products(num_neighbors, small_blocks, monkeypatch):
    if small_blocks:
        monkeypatch.setattr(neighbors, "_QUERY_BLOCK", 37)
        monkeypatch.setattr(neighbors, "_BASE_BLOCK", 50)
    features = integer_features(np.random.default_rng(0), 400)
    found, similarities = joined(find_neighbors(features, num_neighbors=num_neighbors, num_threads=2))
    expected, expected_similarities = brute_force(features, num_neighbors)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(similarities, expected_similarities)
    assert similarities.dtype == np.float32


def test_scores_are_cosines_in_float32_and_no_closer_row_is_left_out():
    features = random_features(np.random.default_rng(1), 500, dim=64)
    features[300:350] = features[7]
    found, similarities = joined(find_neighbors(features, num_neighbors=6))
    products = features.astype(np.float64) @ features.astype(np.float64).T
    np.testing.assert_allclose(similarities, np.take_along_axis(products, found, axis=1), atol=1e-6)
    np.fill_diagonal(products, -np.inf)
    np.put_along_axis(products, found, -np.inf, axis=1)
    assert (products.max(axis=1) <= similarities[:, -1] + 1e-6).all()
    assert not (found == np.arange(500)[:, None]).any()
    assert all(len(set(row)) == 6 for row in found.tolist())


def test_many_duplicates_give_the_same_neighbors_every_time():
    features = random_features(np.random.default_rng(2), 300)
    features[50:250] = features[7]
    first, second = (joined(find_neighbors(features, num_neighbors=5)) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_all_images_alike_are_neighbors_by_row():
    features = np.tile(random_features(np.random.default_rng(1), 1), (90, 1))
    found, _ = joined(find_neighbors(features, num_neighbors=3))
    assert found[0].tolist() == [1, 2, 3]
    assert found[1].tolist() == [0, 2, 3]
    assert (found[3:] == [0, 1, 2]).all()


def test_fewer_neighbors_are_a_prefix():
    features = random_features(np.random.default_rng(2), 300)
    many, _ = joined(find_neighbors(features, num_neighbors=20))
    few, _ = joined(find_neighbors(features, num_neighbors=5))
    np.testing.assert_array_equal(many[:, :5], few)


def test_every_other_image_can_be_a_neighbor_but_no_more():
    features = random_features(np.random.default_rng(3), 4)
    found, _ = joined(find_neighbors(features, num_neighbors=3))
    assert [sorted(row) for row in found.tolist()] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    with pytest.raises(DataError, match=r"only 4 images.*--neighbors 3"):
        next(find_neighbors(features, num_neighbors=4))


def test_the_number_of_threads_of_faiss_is_restored():
    former = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(2)
        list(find_neighbors(random_features(np.random.default_rng(5), 50), num_neighbors=3, num_threads=1))
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(former)


def test_many_images_are_searched_by_an_inverted_file_whose_recall_is_logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("orl_fast"), "propagate", True)
    rng = np.random.default_rng(4)
    centers = random_features(rng, 40)
    features = centers[rng.integers(0, 40, 3000)] + 0.05 * rng.normal(size=(3000, 24)).astype(np.float32)
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    with caplog.at_level(logging.INFO, logger="orl_fast"):
        found, _ = joined(find_neighbors(features, num_neighbors=5, exact_limit=1000))
    expected, _ = brute_force(features, 5)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(expected, found, strict=True)])
    logged = float(caplog.text.split("recall of ")[1].split(" %")[0]) / 100
    assert recall > 0.8
    assert abs(logged - recall) < 0.05
    assert (found >= 0).all()


def test_queries_for_which_the_inverted_file_finds_too_few_are_searched_exactly():
    """Most rows are alike and share one list; the few others are alone in theirs."""
    features = np.tile(integer_features(np.random.default_rng(6), 400)[:1], (400, 1))
    features[:30] = integer_features(np.random.default_rng(7), 400)[120:150]
    found, _ = joined(find_neighbors(features, num_neighbors=20, exact_limit=100))
    assert (found >= 0).all()
    assert all(len(set(row)) == 20 for row in found.tolist())
