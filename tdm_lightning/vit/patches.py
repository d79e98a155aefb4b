"""The patch embedding as one matrix product."""

from __future__ import annotations

from typing import TypeVar

from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.errors import SettingError

Model = TypeVar("Model", bound=nn.Module)


class PatchLinear(nn.Conv2d):
    """A convolution whose windows lie side by side, as reshape and linear: the same parameters, the
    same result, B×E×h×w. Made by :func:`linear_patches`.
    """

    def forward(self, images: Tensor) -> Tensor:
        """The embeddings of patches, B×E×h×w, of images, B×C×H×W."""
        (p, q), batch, channels = self.kernel_size, images.shape[0], images.shape[1]
        h, w = images.shape[2] // p, images.shape[3] // q
        images = images[:, :, : h * p, : w * q]  # what fills no window is left out
        patches = images.reshape(batch, channels, h, p, w, q).permute(0, 2, 4, 1, 3, 5)
        x = F.linear(patches.reshape(batch, h * w, -1), self.weight.flatten(1), self.bias)
        return x.transpose(1, 2).unflatten(2, (h, w))


def linear_patches(model: Model, on: bool = True) -> Model:
    """Have every patch embedding of a model compute its patches by reshape and linear.

    A convolution with kernel = stride is a linear map of each patch, and in half precision it may
    run without tensor cores. The result differs by rounding only. Parameters, their names and the
    number of multiply-accumulates stay.

    Args:
        model: a timm ViT, a reduced model, or any module that holds one; changed in place.
        on: ``False`` gives the convolution back.

    Returns:
        The model.

    Raises:
        ValueError: if no patch embedding in it is a plain convolution without overlap.

    >>> import timm
    >>> vit = linear_patches(timm.create_model("test_vit"))
    >>> type(vit.patch_embed.proj).__name__, list(vit.patch_embed.proj.state_dict())
    ('PatchLinear', ['weight', 'bias'])
    """
    embeddings = [inner.proj for inner in model.modules() if isinstance(inner, PatchEmbed)]
    found = [proj for proj in embeddings if _is_patchify(proj)]
    if not found:
        raise SettingError(
            f"found no patch embedding in {type(model).__name__} that is a plain patchify: expected"
            " timm's PatchEmbed with a convolution whose stride is its kernel, without padding,"
            " dilation and groups; leave linear patches off"
        )
    for proj in found:
        # Another class for the same module: parameters, hooks and whoever holds it stay.
        proj.__class__ = PatchLinear if on else nn.Conv2d
    return model


def _is_patchify(proj: nn.Module) -> bool:
    """Whether it is torch's own convolution with windows side by side, in either form."""
    if type(proj) not in (nn.Conv2d, PatchLinear):
        return False
    assert isinstance(proj, nn.Conv2d)
    return (
        proj.kernel_size == proj.stride
        and proj.padding in ((0, 0), "valid")
        and proj.dilation == (1, 1)
        and proj.groups == 1
    )
