"""Weighted nearest neighbors: how well cosine similarity alone finds objects of the same class."""

from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from orl_fast.evals import Context
from orl_fast.evals.features import Features, encode_labelled
from orl_fast.evals.labels import LabelledOptions
from orl_fast.evals.probe import SCORES, check_parts, counts, scores
from orl_fast.models import Encoder

__all__ = ["SCORES", "Options", "knn", "run", "summary"]
_TEST_BLOCK = 1024


class Options(LabelledOptions):
    num_neighbors: int = Field(default=20, ge=1, description="How many vote.")
    temperature: float = Field(default=0.07, gt=0, description="Of the votes.")


def run(encoder: Encoder, data: Path, options: Options, context: Context) -> dict[str, float]:
    train, test = encode_labelled(encoder, data, options, context)
    return knn(train, test, num_neighbors=options.num_neighbors, temperature=options.temperature)


def summary(values: dict[str, float]) -> str:
    return (
        f"{counts(values)}; k = {values['num_neighbors']:g}, temperature {values['temperature']:g}. Chance: always the most frequent class."
    )


def knn(train: Features, test: Features, *, num_neighbors: int = 20, temperature: float = 0.07) -> dict[str, float]:
    """Classify each test object by its most similar training objects, each voting exp(cosine / temperature).

    The protocol of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018), with the k = 20 that
    later work reports. Returns "top1", "mean_class_accuracy", "chance", "num_neighbors", "temperature" and the counts, and raises, as
    `linear_probe` does.
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
