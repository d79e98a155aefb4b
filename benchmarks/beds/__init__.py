"""The three beds in one table."""
