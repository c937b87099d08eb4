"""The fast gradient sign method (Goodfellow, Shlens & Szegedy 2015, arXiv 1412.6572) on rows of a table.

With E_r a row, g_r the gradient of a loss by it, and `size` the share of the row's length that it moves by:

    delta_r = size |E_r| sign(g_r) / |sign(g_r)|

A length that is relative says the same of tables of any scale: with an absolute one longer rows look like
robust ones. Adversarial training lowers the loss at E + delta, too (He, He, Du & Chua 2018, "Adversarial
personalized ranking for recommendation", arXiv 1808.03908, equations 6-9, who move by g_r / |g_r|).

Shapes: U rows, D dims.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fgsm(rows_UD: Tensor, grad_UD: Tensor, size: float) -> Tensor:
    """The rows moved up their gradient, float32[U, D]; what has no gradient stays and adds no length."""
    rows_UD, sign_UD = rows_UD.float(), grad_UD.float().sign()
    length_U1 = (rows_UD * sign_UD).norm(dim=1, keepdim=True)
    moved: Tensor = rows_UD + size * length_U1 * torch.nn.functional.normalize(sign_UD, dim=1)
    return moved
