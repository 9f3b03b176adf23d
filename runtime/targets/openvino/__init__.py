"""The target openvino: its engine, changes to graphs, and KV caches in pages."""
