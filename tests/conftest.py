"""What holds for every test run."""

import os

# Matrices of tests are tiny: further threads of OpenBLAS only wait for them, busily, at eight times the CPU time. The
# processes that tests start inherit this.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
