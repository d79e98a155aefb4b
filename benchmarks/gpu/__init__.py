"""Everything that wants a GPU, in one command of a few minutes."""
