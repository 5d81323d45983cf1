"""Evaluations of frozen backbones: labelled data → features → named values."""

from orl_fast.evals.features import Features, LabelledFeatures, encode_labelled, encode_objects
from orl_fast.evals.knn import knn
from orl_fast.evals.labels import LabelledData, LabelledObjects, open_labelled, split_by_image, with_test
from orl_fast.evals.probe import linear_probe

__all__ = [
    "Features",
    "LabelledData",
    "LabelledFeatures",
    "LabelledObjects",
    "encode_labelled",
    "encode_objects",
    "knn",
    "linear_probe",
    "open_labelled",
    "split_by_image",
    "with_test",
]
