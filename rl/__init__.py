"""Training. Importing this package limits the spinning of OpenMP's threads, which must happen before torch is loaded."""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # GNU OpenMP's default slows a run down 20 to 30 times beside a busy process
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
