"""Weighted nearest neighbors: how well cosine similarity alone finds objects of the same class."""

import numpy as np
import torch

from orl_fast.evals.features import Features
from orl_fast.evals.probe import check_parts, scores

_TEST_BLOCK = 1024


def knn(train: Features, test: Features, *, num_neighbors: int = 20, temperature: float = 0.07) -> dict[str, float]:
    """Classify each test object by its most similar training objects, each voting exp(cosine / temperature).

    The protocol of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018), with the
    k = 20 that later work reports.

    Returns:
        "top1", "mean_class_accuracy", "chance", "num_neighbors", "temperature" and the counts (see `linear_probe`).
    Raises:
        DataError: fewer than two classes to learn, or nothing to test.
    """
    check_parts(train, test)
    train_x, test_x = (torch.nn.functional.normalize(torch.from_numpy(part.values), dim=1) for part in (train, test))
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(train.labels)).float()  # [M, C]
    k = min(num_neighbors, len(train_x))
    predicted = []
    for start in range(0, len(test_x), _TEST_BLOCK):
        block = test_x[start : start + _TEST_BLOCK]
        similarity, nearest = (block @ train_x.T).topk(k, dim=1)  # [b, k]
        # Less the largest, so that no exponential overflows; the common factor changes no vote.
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)
        predicted.append((one_hot[nearest] * weight[..., None]).sum(1).argmax(1))
    found = scores(torch.cat(predicted).numpy().astype(np.int64), train, test)
    return {**found, "num_neighbors": k, "temperature": temperature}
