"""The library's own subcommands, one file each."""
