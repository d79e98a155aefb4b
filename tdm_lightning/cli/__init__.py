"""The ``tdm`` command line."""

from tdm_lightning.cli.app import entry, main
from tdm_lightning.cli.configs import config_folder, named_configs, with_named_configs

__all__ = ["config_folder", "entry", "main", "named_configs", "with_named_configs"]
