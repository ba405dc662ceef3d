"""Formats of weights: how they are stored, unpacked and multiplied. Knows no models."""

from octavo.quant.dense import DenseFormat, DenseWeight, StoredWeight, WeightFormat

__all__ = ["DenseFormat", "DenseWeight", "StoredWeight", "WeightFormat"]
