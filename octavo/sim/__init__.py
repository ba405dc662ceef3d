"""Engines without hardware: virtual time, a fake model, faults, and a swarm of seeds. No torch."""

from octavo.sim.actions import (
    Action,
    Arrive,
    Cancel,
    CancelEverybody,
    Drain,
    JumpWallClock,
    Pause,
    Squeeze,
)
from octavo.sim.clock import VirtualClock
from octavo.sim.fake_executor import FakeExecutor, oracle_token, oracle_tokens
from octavo.sim.faults import Fault, Faults, FaultyExecutor, Injection
from octavo.sim.history import Client, History
from octavo.sim.parts import EngineSetup, Parts
from octavo.sim.simulation import SimulatedEngine

__all__ = [
    "Action",
    "Arrive",
    "Cancel",
    "CancelEverybody",
    "Client",
    "Drain",
    "EngineSetup",
    "FakeExecutor",
    "Fault",
    "Faults",
    "FaultyExecutor",
    "History",
    "Injection",
    "JumpWallClock",
    "Parts",
    "Pause",
    "SimulatedEngine",
    "Squeeze",
    "VirtualClock",
    "oracle_token",
    "oracle_tokens",
]
