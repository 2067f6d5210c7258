"""Attention over two parts of the keys, joined from that over each."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_parts"]


def merge_parts(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two parts of the keys from that over each: out [B, T, H, D], lse [B, H, T], as they come."""
    joint = torch.logaddexp(lse, more_lse)
    safe = joint.clamp_min(torch.finfo(joint.dtype).min)  # both -inf: nothing seen yet
    share, more_share = ((part - safe).exp().transpose(1, 2).unsqueeze(-1) for part in (lse, more_lse))
    return out * share + more_out * more_share, joint
