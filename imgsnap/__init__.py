"""imgsnap: OCI images as lazily loaded, deduplicated block snapshots."""

__version__ = "0.1.0"
