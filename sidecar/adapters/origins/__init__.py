"""Origins: where adapters come from, and how they are brought here in one piece or not at all."""
