"""The roofline of a machine: how fast it reads memory and multiplies matrices, and how near a model comes to that."""
