"""To be imported before torch: let its threads sleep while they wait for each other, unless the user has said how.

OpenMP's threads spin at every barrier: with one other busy process on 2 cores that makes a step 9 times slower.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
