"""From an OCI image to a snapshot. Never imports the loader (fuse, mount)."""
