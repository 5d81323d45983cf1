"""Weighted nearest neighbors: how well cosine similarity alone finds objects of the same class."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from orl_fast.console import progress
from orl_fast.evals import Context
from orl_fast.evals.features import Features, encode_labelled
from orl_fast.evals.labels import LabelledOptions
from orl_fast.evals.probe import SCORES, check_parts, counts, scores
from orl_fast.models import Encoder

__all__ = ["SCORES", "Options", "knn", "run", "summary"]
_TEST_BLOCK, _TRAIN_BLOCK = 1024, 65_536  # objects compared at once: 256 MB of similarities
_CPU = torch.device("cpu")


class Options(LabelledOptions):
    num_neighbors: int = Field(default=20, ge=1, description="How many vote.")
    temperature: float = Field(default=0.07, gt=0, description="Of the votes.")


def run(encoder: Encoder, data: Path, options: Options, context: Context) -> dict[str, float]:
    train, test = encode_labelled(encoder, data, options, context)
    return knn(train, test, num_neighbors=options.num_neighbors, temperature=options.temperature, device=context.device)


def summary(values: dict[str, float]) -> str:
    return (
        f"{counts(values)}; k = {values['num_neighbors']:g}, temperature {values['temperature']:g}. Chance: always the most frequent class."
    )


def knn(
    train: Features, test: Features, *, num_neighbors: int = 20, temperature: float = 0.07, device: torch.device = _CPU
) -> dict[str, float]:
    """Classify each test object by its most similar training objects, each voting exp(cosine / temperature).

    The protocol of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018), with the k = 20 that
    later work reports. Memory is bounded: features are compared in blocks. Returns "top1", "mean_class_accuracy", "chance",
    "num_neighbors", "temperature" and the counts, and raises, as `linear_probe` does.
    """
    check_parts(train, test)
    train_x, test_x = (torch.from_numpy(part.values) for part in (train, test))
    labels, num_classes, k = torch.from_numpy(train.labels), int(train.labels.max()) + 1, min(num_neighbors, len(train_x))
    predicted = []
    with progress("comparing", total=len(test_x), unit="objects") as advance:
        for start in range(0, len(test_x), _TEST_BLOCK):
            block = F.normalize(test_x[start : start + _TEST_BLOCK].to(device), dim=1)
            similarity, nearest = _nearest(block, train_x, k=k)  # [b, k]
            # Less the largest, so that no exponential overflows; the common factor changes no vote.
            weight = torch.exp((similarity - similarity[:, :1]) / temperature)
            votes = torch.zeros(len(block), num_classes).scatter_add_(1, labels[nearest], weight)
            predicted.append(votes.argmax(1))
            advance(len(block))
    found = scores(torch.cat(predicted).numpy().astype(np.int64), train, test)
    return {**found, "num_neighbors": k, "temperature": temperature}


def _nearest(block: torch.Tensor, train: torch.Tensor, *, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, k] cosine similarities and positions of the most similar of `train` [M, D] to unit vectors [b, D], on the CPU."""
    found: tuple[torch.Tensor, torch.Tensor] | None = None
    for first in range(0, len(train), _TRAIN_BLOCK):
        part = F.normalize(train[first : first + _TRAIN_BLOCK].to(block.device), dim=1)
        similarity, nearest = (block @ part.T).topk(min(k, len(part)), dim=1)
        nearest += first
        if found is not None:
            similarity, nearest = torch.cat([found[0], similarity], dim=1), torch.cat([found[1], nearest], dim=1)
            similarity, chosen = similarity.topk(min(k, similarity.shape[1]), dim=1)
            nearest = nearest.gather(1, chosen)
        found = similarity, nearest
    assert found is not None
    return found[0].cpu(), found[1].cpu()
