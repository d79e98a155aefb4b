"""A merger of one's own: neighbours in the sequence become their mean.

PYTHONPATH=examples tdm fit --config quickstart --model.strategy EViT \
    --model.strategy.merger merger_of_your_own.Neighbours
"""

import torch

import tdm_lightning as tdm


class Neighbours(tdm.Merger):
    """Cuts the sequence of patches into as many pieces as may stay; each becomes its mean."""

    def __call__(self, seen, keep):
        batch, n, width = seen.x.shape
        here = torch.arange(n, device=seen.x.device).expand(batch, n)
        group = here * keep // n
        size = seen.size.new_zeros(batch, keep).scatter_add(1, group, seen.size)
        share = (seen.size / size.gather(1, group)).to(seen.x.dtype).unsqueeze(-1)
        index = group.unsqueeze(-1).expand(-1, -1, width)
        x = seen.x.new_zeros(batch, keep, width).scatter_add(1, index, share * seen.x)
        return tdm.Reduction(x, group, torch.full_like(group, int(tdm.Role.MATCHED)), size)
