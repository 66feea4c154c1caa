"""Data that comes with the package, as shards: `builtin:NAME` wherever a data folder is asked for."""
