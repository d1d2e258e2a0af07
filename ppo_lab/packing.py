"""Which samples go through a model together, so that little padding does."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_by_tokens(lengths: Tensor, *, limit: int) -> list[Tensor]:
    """Rows, longest first, in groups whose padded size stays within `limit` tokens; a longer row
    stands alone.
    """
    groups: list[list[int]] = []
    for row in lengths.argsort(descending=True, stable=True).tolist():
        if groups and int(lengths[groups[-1][0]]) * (len(groups[-1]) + 1) <= limit:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [torch.tensor(group) for group in groups]
