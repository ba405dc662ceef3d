"""The ways between host and device: one copy down and one up for each step, neither waited for.

Knows bytes and streams; no plans.
"""

import torch
from torch import Tensor

from octavo.runner.sampler import Drawn

NUM_BUFFERS = 3  # steps that may be on their way at once, and one that is written


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


class Uplink:
    """Pinned buffers that take turns, and the place on the device where they arrive.

    On a CPU there is one buffer, and it is the place.
    """

    def __init__(self, num_words: int, device: str):
        on_gpu = device == "cuda"
        self._buffers = [
            torch.zeros(num_words, dtype=torch.int32, pin_memory=on_gpu)
            for _ in range(NUM_BUFFERS if on_gpu else 1)
        ]
        self._copied = [_event() for _ in self._buffers] if on_gpu else []
        self._turn = 0
        self.device_memory = self._buffers[0]
        if on_gpu:
            self.device_memory = torch.zeros(num_words, dtype=torch.int32, device=device)

    @property
    def num_words(self) -> int:
        """32-bit words that one step may take."""
        return self.device_memory.shape[0]

    def next_buffer(self) -> Tensor:
        """The host memory to write the next step to, [num_words] int32."""
        self._turn = (self._turn + 1) % len(self._buffers)
        if self._copied:
            self._copied[self._turn].synchronize()  # long past, unless the host is far ahead
        return self._buffers[self._turn]

    def send(self, num_words: int) -> None:
        """Copy the beginning of that memory to the device, in the order of the stream."""
        if self._copied:
            buffer = self._buffers[self._turn]
            self.device_memory[:num_words].copy_(buffer[:num_words], non_blocking=True)
            self._copied[self._turn].record()


class Readback:
    """Drawn ids on their way to the host, or just the end of the step that draws none."""

    def __init__(self, token_ids: Tensor | None, device: torch.device):
        self._token_ids = token_ids
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            if token_ids is not None:
                # Out of a cache of pinned memory: the next step overwrites what is on the device.
                self._token_ids = torch.empty(token_ids.shape, dtype=torch.int64, pin_memory=True)
                self._token_ids.copy_(token_ids, non_blocking=True)
            self._arrived = _event()
            self._arrived.record()

    def wait(self) -> Drawn:
        """The ids, as soon as the device is done."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return Drawn([] if self._token_ids is None else self._token_ids.tolist())
