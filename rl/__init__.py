"""Training. Importing this package limits how long OpenMP's threads spin, which must happen before torch is loaded.

On a CPU, torch's threads wait for each other by spinning. If another process needs a core, GNU OpenMP's default makes a
step 20 to 30 times slower; with 1,000 iterations it is two to three times slower, and as fast as before alone.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
