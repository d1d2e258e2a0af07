"""Numbers on their way from a GPU to the host, which does not wait before it needs them."""

from __future__ import annotations

import torch
from torch import Tensor


class Asked:
    """Numbers that a device was asked for, as they are then. Read later, they are waited for no
    longer than it takes what the device was told before the question; what it was told since goes
    on meanwhile.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._arrived = None
        if numbers.device.type != "cuda":
            self._numbers = numbers.clone()
        else:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> Tensor:
        """The numbers, in the host's memory."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.cpu()
