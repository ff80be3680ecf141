"""The KServe v2 API: unmodified Triton clients that name an adapter."""
