"""Tests that need a real SGLang. It runs on a CPU over the packages of vLLM's environment.

SGLang's kernels are for GPUs, so it computes with torch's own attention, and a stub stands in for `sgl_kernel`. What is
tested is the server: its scheduler, its registry of adapters, its API and its texts. `csgmv`, graphs, overlap loading,
and more than one rank are not.
"""
