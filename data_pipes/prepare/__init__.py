"""Makes shards from a data set or from a folder of images: `python -m data_pipes.prepare NAME --out DIR`."""
