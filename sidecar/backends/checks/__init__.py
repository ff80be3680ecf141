"""Parts shared by the checks of all kinds: findings, and what answers at an address."""
