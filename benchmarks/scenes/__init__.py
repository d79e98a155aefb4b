"""Garments among clutter: a set of images in which attention has something to say."""
