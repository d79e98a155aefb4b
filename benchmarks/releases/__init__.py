"""Two releases of the library against each other."""
