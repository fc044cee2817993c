"""The containerd snapshotter: a proxy plugin that serves images from their EROFS snapshots."""
