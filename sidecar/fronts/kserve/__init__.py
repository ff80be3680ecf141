"""The KServe v2 API for unmodified Triton clients that name an adapter."""
