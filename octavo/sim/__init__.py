"""Engines without hardware: a virtual clock and an executor that needs no model. No torch."""

from octavo.sim.clock import VirtualClock
from octavo.sim.fake_executor import FakeExecutor, oracle_token, oracle_tokens

__all__ = ["FakeExecutor", "VirtualClock", "oracle_token", "oracle_tokens"]
