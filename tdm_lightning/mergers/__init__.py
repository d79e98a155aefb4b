"""What N tokens become when fewer may stay."""

from tdm_lightning.mergers.token_merger import TokenMerger

__all__ = ["TokenMerger"]
