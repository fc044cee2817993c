"""Serving a block device's bytes to the kernel through /dev/fuse."""
