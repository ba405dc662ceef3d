"""Formats of weights: how they are stored, unpacked and multiplied. Knows no models."""

from octavo.quant.dense import (
    DenseExperts,
    DenseFormat,
    DenseWeight,
    StoredExperts,
    StoredWeight,
    WeightFormat,
)

__all__ = [
    "DenseExperts",
    "DenseFormat",
    "DenseWeight",
    "StoredExperts",
    "StoredWeight",
    "WeightFormat",
]
