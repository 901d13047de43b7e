"""Training. Importing this package sets limits on a CPU, which must happen before torch is loaded.

They are on the spinning of OpenMP's threads, and on what oneDNN and its wrapper in torch keep for each number of tokens.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # GNU OpenMP's default slows a run down 20 to 30 times beside a busy process
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")  # the default, 1024, takes up to 1.3 GB in bf16
os.environ.setdefault("LRU_CACHE_CAPACITY", "1")  # the default, 1024, takes 0.3 GB more; a step is as fast without it
