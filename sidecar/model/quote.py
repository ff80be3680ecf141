"""Text that the sidecar shows and reads nothing from."""

from __future__ import annotations

from typing import Annotated

import msgspec

Quote = Annotated[str, msgspec.Meta(description="free text")]
"""What an engine, a library, the system or a person said, or an error that was raised outside the core."""
