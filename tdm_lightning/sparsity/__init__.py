"""Weight sparsity that moves while the network learns, and the small dense network that it ends
in.
"""

from tdm_lightning.sparsity.base import Sparsity
from tdm_lightning.sparsity.density import erk_densities
from tdm_lightning.sparsity.exchange import death_rate, exchange
from tdm_lightning.sparsity.extract import (
    active_parameters,
    adopt_masks,
    apply_masks,
    extract_dense,
)
from tdm_lightning.sparsity.structured import Structured
from tdm_lightning.sparsity.svite import SViTE
from tdm_lightning.sparsity.unstructured import Unstructured

__all__ = [
    "SViTE",
    "Sparsity",
    "Structured",
    "Unstructured",
    "active_parameters",
    "adopt_masks",
    "apply_masks",
    "death_rate",
    "erk_densities",
    "exchange",
    "extract_dense",
]
