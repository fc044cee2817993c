"""containerd's gRPC API as this project uses it; `api` holds the generated stubs."""
