"""Raw feeds: the real data set and a synthetic shop."""
