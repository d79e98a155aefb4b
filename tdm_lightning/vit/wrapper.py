"""A ViT whose blocks run through a strategy's hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdm_lightning.core.output import Output
from tdm_lightning.core.reduction import Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.core.trace import History, Trace
from tdm_lightning.errors import SettingError
from tdm_lightning.ops import first_members, gather_tokens, group_totals, unmerge
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.strategies.objective import TrainingObjective
from tdm_lightning.vit.adapters import Adapter, adapter_for
from tdm_lightning.vit.timm_tools import TimmTools

#: Called with a stage's name and the block's index after each stage of a pass; for counters and
#: clocks.
Watch = Callable[[str, int], None]


class HookPoint(nn.Identity):
    """Where monitors listen: called after each block with its tokens and which of them are no
    padding; gives the tokens back.
    """

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """The tokens as they are, B×T×C; ``valid``, B×T, bool, says which are no padding,
        ``None``: all.
        """
        return x


class TokenReducedViT(TimmTools, nn.Module):
    """A timm Vision Transformer that reduces its tokens as it goes. Made by
    :func:`tdm_lightning.attach`.

    It behaves as the timm model does: ``forward``, ``forward_features``, ``forward_head``,
    ``forward_intermediates``, and what timm's optimizers and training tools ask for.

    Attributes:
        vit: the timm model, untouched.
        strategy: what happens between its layers.
        hook_points: one identity module per block, called with the tokens after that block,
            B×T×C, and which of them are no padding. Register forward hooks here: the blocks' own
            hooks do not fire, because their halves are run one by one.
    """

    def __init__(self, vit: Any, strategy: Strategy) -> None:
        super().__init__()
        self.vit: Any = vit
        self.strategy = strategy
        self.hook_points = nn.ModuleList(HookPoint() for _ in adapter_for(vit).blocks(vit))
        self._adapter: Adapter = adapter_for(vit)
        self._info = self._adapter.info(vit)
        requirements = strategy.requires()
        self._follows_sizes, self._chooses_rows = requirements.sizes, requirements.rows
        self._merges_ahead = requirements.ahead
        self._spares_last = self._adapter.takes_rows and self._info.readout is not None
        # A model that is ready for inference stays so, though the strategy is new; parts of it that
        # were frozen stay frozen.
        self.training = vit.training
        strategy.train(vit.training)
        self.hook_points.train(vit.training)

    @property
    def objective(self) -> TrainingObjective:
        """What the strategy does to training; by default the task loss alone."""
        return self.strategy.objective or TrainingObjective()

    def run(
        self,
        images: Tensor,
        trace: bool = False,
        watch: Watch | None = None,
        logits_alone: bool = False,
    ) -> Output:
        """One forward pass with everything it knows.

        Args:
            images: B×3×H×W.
            trace: also follow every patch.
            watch: called after each stage with its name (``embed``, ``begin``, ``before_block``,
                ``attention``, ``after_attention``, ``mlp``, ``after_block``, ``finish``, ``head``)
                and the block's index (-1 outside blocks).
            logits_alone: nothing else is wanted: then features and sizes may be left out for tokens
                that the head does not read, see :meth:`forward`.

        Returns:
            Logits, features, sizes, the strategy's own tensors, and the trace if asked for.

        Raises:
            ValueError: if the images have the wrong shape.
        """
        alone = logits_alone and not trace and self.reads_class_tokens
        tokens, counts, _ = self._encode(images, trace, watch, logits_alone=alone)
        features = self._adapter.norm(self.vit, tokens.x)
        logits = self.forward_head(features, tokens.size)
        if watch is not None:
            watch("head", -1)
        history = tokens.history
        found = None if history is None else Trace(counts, list(history.layers))
        return Output(logits, features, tokens.size, tokens.state, found)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, B×classes, of images, B×3×H×W.

        Where the head reads class tokens alone, the last block computes no other row. That changes
        nothing but the time, and is left out where somebody listens: a hook at the last of
        :attr:`hook_points`, in the last block or at the final norm.
        """
        return self.run(images, logits_alone=True).logits

    @property
    def in_place(self) -> bool:
        """Whether :attr:`vit` runs itself with reduced blocks, and this is what tools ask of it."""
        return self._adapter.in_place

    @property
    def reads_class_tokens(self) -> bool:
        """Whether :meth:`forward` computes the last block for the class tokens alone."""
        last = self._info.depth - 1
        return (
            self._spares_last
            and self.strategy.spares_class_tokens()
            and not _listened(self.hook_points[last])
            and not _listened(self._adapter.blocks(self.vit)[last])
            and not any(map(_listened, self._adapter.norms(self.vit)))
        )

    def trace(self, images: Tensor) -> tuple[Tensor, Trace]:
        """Logits, and what became of every patch."""
        output = self.run(images, trace=True)
        assert output.trace is not None
        return output.logits, output.trace

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the final norm, B×T×C. For average pooling :meth:`forward_head` also wants
        ``run(images).size``.
        """
        tokens, _, _ = self._encode(images)
        return self._adapter.norm(self.vit, tokens.x)

    def forward_head(
        self, features: Tensor, size: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor:
        """The model's head on reduced tokens; see
        :meth:`tdm_lightning.vit.adapters.Adapter.head`.
        """
        return self._adapter.head(self.vit, features, size, pre_logits)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Dense features of chosen blocks, as timm's method of that name gives them.

        Every original patch gets the feature of the token that holds it after that block, zero
        where it was dropped, in the original order: B×C×H×W or B×N0×C whatever the strategy
        did.

        Args:
            images: B×3×H×W.
            indices: the last n blocks, chosen ones, or all.
            return_prefix_tokens: pair every map with its prefix tokens.
            norm: apply the final norm to the maps.
            stop_early: end the pass behind the last wanted block; the final features are then those
                that it leaves.
            output_fmt: ``"NCHW"`` or ``"NLC"``.
            intermediates_only: leave out the final features.

        Returns:
            The list of maps, or ``(final features B×T×C, list)``.

        Raises:
            ValueError: for another ``output_fmt``.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise SettingError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted, last = feature_take_indices(
            self._info.depth,
            indices if indices is None or isinstance(indices, int) else list(indices),
        )
        tokens, _, states = self._encode(
            images, trace=True, keep=frozenset(wanted), last=last if stop_early else None
        )
        grid = self._adapter.grid(self.vit, (images.shape[-2], images.shape[-1]))

        def shown(x: Tensor) -> Tensor:
            return self._adapter.norm(self.vit, x) if norm else x

        maps: list[Any] = []
        for state in states:
            assert state.history is not None
            patches = state.full_batch(shown(self.strategy.all_patches(state)))
            dense = unmerge(patches, state.history.source)
            if output_fmt == "NCHW":
                dense = dense.transpose(1, 2).unflatten(2, grid).contiguous()
            if return_prefix_tokens and self.num_prefix_tokens:
                first = state.full_batch(shown(state.x[:, : self.num_prefix_tokens]))
                maps.append((dense, first))
            else:
                maps.append(dense)
        if intermediates_only:
            return maps
        return self._adapter.norm(self.vit, tokens.x), maps

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Dense features as DINO's users ask for them, see :meth:`forward_intermediates`.

        Args:
            images: B×3×H×W.
            n: the last n blocks, or chosen ones.
            reshape: maps B×C×H×W in place of sequences B×N0×C.
            return_prefix_tokens: pair every map with its prefix tokens.
            norm: apply the final norm.
        """
        shape = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            images, n, return_prefix_tokens, norm, output_fmt=shape, intermediates_only=True
        )

    def forward_merged(
        self, images: Tensor, index: int = -1, norm: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The tokens that are left after a block, and their sizes: for a model that reads them in
        place of all patches, such as a language model.

        They stand in the order of their first patches, along the rows of the image; those that wait
        outside the blocks are among them. No later block runs.

        Args:
            images: B×3×H×W.
            index: the block, from 0; negative ones count from the last.
            norm: apply the final norm.

        Returns:
            The tokens without prefix tokens, B×M×C, and how many patches each of them holds, B×M,
            float32: 0 for a row that only pads an image with fewer tokens than others.

        Raises:
            ValueError: if there is no such block, or the images have the wrong shape.
        """
        depth = self._info.depth
        if not -depth <= index < depth:
            raise SettingError(f"index must be that of one of {depth} blocks, got {index}")
        last = index % depth
        _, _, (state,) = self._encode(images, trace=True, keep=frozenset({last}), last=last)
        assert state.history is not None
        x = state.full_batch(self.strategy.all_patches(state))
        source, count = state.history.source, x.shape[1]
        slot = torch.where(source < 0, count, source)
        size = group_totals(torch.ones_like(slot, dtype=torch.float32), slot, count + 1)[:, :count]
        first = first_members(source, count)
        order = first.masked_fill(size == 0, source.shape[1]).argsort(dim=1, stable=True)
        patches = gather_tokens(self._adapter.norm(self.vit, x) if norm else x, order)
        return patches, size.gather(1, order)

    def _encode(
        self,
        images: Tensor,
        trace: bool = False,
        watch: Watch | None = None,
        keep: frozenset[int] = frozenset(),
        last: int | None = None,
        logits_alone: bool = False,
    ) -> tuple[Tokens, list[Any], list[Tokens]]:
        """Blocks, all or up to ``last``: the final tokens, the token counts after each block, the
        tokens after ``keep``. With ``logits_alone`` the final tokens may be the class tokens only.
        """
        watch = watch or _unwatched
        tokens = self._embed(images, trace)
        watch("embed", -1)
        tokens = self.strategy.begin(tokens)
        watch("begin", -1)
        counts: list[Any] = []
        kept: list[Tokens] = []
        remat = getattr(self.vit, "grad_checkpointing", False) and torch.is_grad_enabled()
        for index in range(self._info.depth if last is None else last + 1):
            spare = logits_alone and index == self._info.depth - 1
            if remat:
                tokens = checkpoint(self._block, index, tokens, watch, spare, use_reentrant=False)
            else:
                tokens = self._block(index, tokens, watch, spare)
            if spare and not tokens.count:
                return tokens, counts, kept
            x = self.hook_points[index](tokens.x, tokens.valid)
            if x is not tokens.x:  # a hook gave another
                tokens = tokens.replace(x=x)
            if self.strategy.adaptive and trace:
                counts.append(tokens.full_batch(tokens.valid_patches.sum(dim=1)))
            else:
                counts.append(tokens.count)
            if index in keep:
                kept.append(tokens)
        tokens = self.strategy.finish(tokens)
        watch("finish", -1)
        return tokens, counts, kept

    def _block(self, index: int, tokens: Tokens, watch: Watch, spare: bool = False) -> Tokens:
        """A block; with ``spare`` its class tokens only, where that can be."""
        adapter, strategy = self._adapter, self.strategy
        block = adapter.blocks(self.vit)[index]
        tokens = strategy.before_block(index, tokens)
        watch("before_block", index)
        if tokens.images is not None and not len(tokens.images):
            return tokens  # all have left
        ahead = strategy.ahead(index, tokens) if self._merges_ahead else None
        if ahead is not None:
            tokens = adapter.attend_ahead(block, tokens, ahead)
            watch("attention", index)
            return self._fed_forward(index, block, tokens, watch)
        needs = strategy.needs(index, tokens.info)
        if spare and tokens.policy is None:
            count = tokens.info.class_tokens
            x, _ = adapter.attend(block, index, tokens, frozenset(), count)
            watch("attention", index)
            x = adapter.feed_forward(block, x)
            watch("mlp", index)
            return tokens.replace(x=x, prefix=count, size=None)
        rows: int | None = strategy.rows(index, tokens) if self._chooses_rows else None
        x, read = adapter.attend(block, index, tokens, needs, rows)
        watch("attention", index)
        seen = read() if needs else Seen(x[:, tokens.prefix :], prefix=tokens.prefix)
        tokens = strategy.after_attention(index, tokens.replace(x=x), seen)
        watch("after_attention", index)
        return self._fed_forward(index, block, tokens, watch)

    def _fed_forward(self, index: int, block: nn.Module, tokens: Tokens, watch: Watch) -> Tokens:
        tokens = tokens.replace(x=self._adapter.feed_forward(block, tokens.x))
        watch("mlp", index)
        tokens = self.strategy.after_block(index, tokens)
        watch("after_block", index)
        return tokens

    def _embed(self, images: Tensor, trace: bool) -> Tokens:
        tokens = self._adapter.embed(self.vit, images, self._info)
        batch, patches, device = tokens.x.shape[0], tokens.count, tokens.x.device
        if self._follows_sizes and tokens.size is None:
            tokens = tokens.replace(size=torch.ones(batch, patches, device=device))
        if trace:
            source = torch.arange(patches, device=device).expand(batch, -1)
            tokens = tokens.replace(history=History(source))
        return tokens

    # Sharing

    def save_pretrained(
        self,
        save_directory: str | Path,
        config: Mapping[str, Any] | None = None,
        license: str | None = None,
        repo_id: str = "USER/NAME",
    ) -> None:
        """Write the model to a folder: weights, strategy, and a model card.

        First it is built again from what would be written, and must give the same outputs.

        Args:
            save_directory: the folder, made if need be; a ``README.md`` that is there stays.
            config: entries of ``config.json`` to add or replace: ``label_names``, or
                ``model_args``, the arguments of ``timm.create_model`` where the model does not know
                them any more.
            license: the licence of the weights, as the hub spells it; ``None``: left open.
            repo_id: the repository that the model card says to load from.

        Raises:
            ValueError: if the model cannot be built again from its architecture's name and these
                arguments, or the folder cannot be written.
        """
        _sharing().save(self, save_directory, config, license, repo_id)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> TokenReducedViT:
        """The model of a folder or a repository of the hub, ready for inference.

        Args:
            pretrained_model_name_or_path: what :meth:`save_pretrained` wrote, or a repository,
                ``USER/NAME``.
            force_download: download again what lies in the cache.
            token: for private repositories; by default that of ``hf auth login``.
            cache_dir: folder for downloads.
            local_files_only: use only what has been downloaded before.
            revision: branch, tag or commit.

        Raises:
            ValueError: if there is no such repository within reach, or its files are incomplete, of
                a newer version of this library, for another model, or name a strategy that is not
                imported.
        """
        return _sharing().load(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        config: Mapping[str, Any] | None = None,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        **commit: Any,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes.

        Args:
            repo_id: the repository, ``USER/NAME``; made if need be.
            config: as in :meth:`save_pretrained`.
            license: likewise.
            private: whether a new repository is private.
            token: by default that of ``hf auth login``.
            commit: passed to ``HfApi.upload_folder``, such as ``commit_message`` or ``create_pr``.

        Returns:
            The address of the commit.
        """
        return _sharing().push(self, repo_id, config, license, private, token, **commit)


def _sharing() -> Any:
    """What saves, loads and uploads reduced models: by its name, as it stands two floors up."""
    return import_module("tdm_lightning.hub").Hub()


def _listened(module: nn.Module) -> bool:
    """Whether anybody hooked a function to a module or to one inside it."""
    return any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())


def _unwatched(stage: str, index: int) -> None:
    pass
