"""Audio that lies inside other files: tar archives (WebDataset), Parquet and Arrow tables with an Audio column."""
