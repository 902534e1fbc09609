"""How large each set is, as its authors published it."""

from __future__ import annotations

from modelstock_jax.data.whole import Published

PUBLISHED = {
    "train": Published(1000, 1_281_167),
    "validation": Published(1000, 50_000, even=True),
    "v2": Published(1000, 10_000, even=True),
    "r": Published(200, 30_000),
    "sketch": Published(1000, 50_889),
    "a": Published(200, 7_500),
    "objectnet": Published(113, 18_574),
}
"""ImageNet-1K (Russakovsky et al. 2015), V2 matched-frequency (Recht et al. 2019), R (Hendrycks
et al. 2021a), Sketch (Wang et al. 2019), A (Hendrycks et al. 2021b) and the part of ObjectNet
(Barbu et al. 2019) whose classes ImageNet has."""
