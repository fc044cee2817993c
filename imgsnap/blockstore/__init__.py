"""Content-addressed reads: chunk index, node cache, fetcher and block reader."""
