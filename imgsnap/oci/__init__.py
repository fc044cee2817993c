"""The OCI vocabulary and the places a snapshot can be kept: registries, image layouts, archives."""
