"""Training. Importing this package sets two limits on a CPU, which must happen before torch is loaded.

One is on the spinning of OpenMP's threads, the other on the kernels that oneDNN keeps, one for each number of tokens.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # GNU OpenMP's default slows a run down 20 to 30 times beside a busy process
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")  # the default, 1024, takes up to 1.3 GB in bf16
