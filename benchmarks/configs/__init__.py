"""Configuration files, found by name: ``--config quickstart``."""
