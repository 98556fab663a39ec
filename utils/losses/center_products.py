"""Products of features with class centres, block by block as these lie in memory."""

import torch

from utils.losses.center_storage import CenterStorage, one_over_length

# Classes from which on the threads of a CPU share them out in a product.
LARGE_SHARE = 1024


def cosines(features, centers: CenterStorage, chosen) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, n) cosines of normalised features with the chosen centres, and 1 / their lengths (n,)."""
    count = len(centers.weight) if chosen is None else len(chosen)
    cosine = centers.matrix.take(len(features), count, features.device)
    lengths = []
    for part, block in centers.blocks(chosen, features.device):
        torch.mm(features, block.t(), out=cosine[:, part])
        if centers.learned:
            lengths.append(one_over_length(block))
    if centers.learned:
        per_length = torch.cat(lengths)
    else:
        per_length = centers.per_length()
        per_length = (per_length if chosen is None else per_length[chosen]).to(features.device)
    return cosine.mul_(per_length), per_length


def features_gradient(grad, centers: CenterStorage, chosen) -> torch.Tensor:
    """grad (B, n) of the products with the chosen centres -> (B, D)."""
    total = None
    for part, block in centers.blocks(chosen, grad.device):
        if total is None:
            total = product(grad[:, part], block)
        else:
            total.addmm_(grad[:, part], block)
    return total


def product(grad: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """grad (B, n) @ block (n, D).

    Where n is large, each thread of a CPU takes a share of the n and the results are added: a fifth
    faster than sharing out the B rows.
    """
    threads = torch.get_num_threads() if grad.device.type == "cpu" else 1
    share = len(block) // threads
    if threads == 1 or share < LARGE_SHARE:
        return grad @ block
    even = threads * share
    by_thread = grad[:, :even].unflatten(1, (threads, share)).transpose(0, 1)
    total = torch.bmm(by_thread, block[:even].unflatten(0, (threads, share))).sum(0)
    return total.addmm_(grad[:, even:], block[even:])
