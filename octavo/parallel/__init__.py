"""Shards and collectives. Knows neither models nor requests."""

from octavo.parallel.group import ParallelGroup

__all__ = ["ParallelGroup"]
