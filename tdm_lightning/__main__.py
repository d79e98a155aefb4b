"""``python -m tdm_lightning`` is ``tdm``."""

from tdm_lightning.cli import main

if __name__ == "__main__":
    main()
