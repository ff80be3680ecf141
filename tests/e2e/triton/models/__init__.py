"""The emulated engine as Python models of a real Triton.

These modules run in the stub processes of Triton's Python backend. A repository's `1/model.py` has one line, such as
`from tests.e2e.triton.models.core import TritonPythonModel`.
"""
