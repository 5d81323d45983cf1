"""Pairs against a plain loop over their definition."""

import numpy as np
import pytest
import torch

from orl_fast.mining.pairs import top_pairs
from orl_fast.tables import num_pairs


def plain_pairs(query, partner, count):
    """All entries of the cosine matrix, one by one; best first, of equal ones the first of the flattened matrix."""
    entries = []
    for q in range(len(query)):
        for p in range(len(partner)):
            cosine = np.float32(sum(float(a) * float(b) for a, b in zip(query[q], partner[p], strict=True)))
            entries.append((-cosine, q, p))
    return [(q, p, -negative) for negative, q, p in sorted(entries)[:count]]


def random_features(rng, num, dim=16):
    features = np.maximum(rng.normal(size=(num, dim)) - 0.3, 0 if rng.random() < 0.5 else -np.inf)
    features[rng.random(num) < 0.3] = features[0]  # ties
    return (features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-6)).astype(np.float16)


@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize("pair_ratio", [0.1, 0.5, 1.0])
def test_pairs_are_the_best_entries_of_the_matrix(pair_ratio, variant):
    rng = np.random.default_rng(7)
    for _ in range(8):
        query = random_features(rng, int(rng.integers(1, 30)))
        partners = [random_features(rng, int(rng.integers(1, 30))) for _ in range(4)]
        partners[1] = query  # a duplicate image
        found = top_pairs(query, partners, pair_ratio=pair_ratio, variant=variant, device=torch.device("cpu"))
        assert len(found) == len(partners)
        for pairs, partner in zip(found, partners, strict=True):
            share = len(query) if variant == "official" else len(query) * len(partner)
            count = min(max(1, int(pair_ratio * share)), len(query) * len(partner))
            assert count == num_pairs(len(query), len(partner), pair_ratio=pair_ratio, variant=variant)
            assert pairs.tolist() == plain_pairs(query, partner, count)


def test_fewer_pairs_are_a_prefix():
    rng = np.random.default_rng(8)
    query, partner = random_features(rng, 40), random_features(rng, 35)
    options = {"variant": "official", "device": torch.device("cpu")}
    many, few = (top_pairs(query, [partner], pair_ratio=ratio, **options)[0] for ratio in (0.2, 0.05))
    assert len(many) == 8
    assert many[: len(few)].tolist() == few.tolist()
