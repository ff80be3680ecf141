"""Origins: where adapters come from, and how they are fetched, completely or not at all."""
