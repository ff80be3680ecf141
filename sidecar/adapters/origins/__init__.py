"""Origins: where adapters come from, and how they are brought here in one piece or not at all."""

from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.failures import Stopped
from sidecar.adapters.origins.fetching import fetch
from sidecar.adapters.origins.limits import Limits, Progress, Surroundings
from sidecar.adapters.origins.origin import PUSHED, Origin, is_url, parse_origin

__all__ = [
    "PUSHED", "AllowList", "Limits", "Origin", "Progress", "Stopped", "Surroundings", "fetch", "is_url", "parse_origin"
]  # fmt: skip
