"""``python -m tdm_lightning`` is ``tdm``."""

from tdm_lightning.cli import entry

if __name__ == "__main__":
    entry()
