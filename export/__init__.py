import runtime  # noqa: F401 - first: it keeps libraries from calling home
