"""What the target openvino needs besides its file: changes to graphs, and caches in pages."""
