"""The recipe of each demo adapter; together, the recipes cover the common forms of PEFT adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = ATTENTION + FEED_FORWARD


@dataclass(frozen=True)
class Recipe:
    """The fields of PEFT's LoraConfig that the demo adapters vary, and how each learns: for how
    many steps, with how many made-up prompts in each."""

    rank: int
    alpha: float
    modules: tuple[str, ...] = ALL_LINEAR
    steps: int = 1000
    made_up: int = 8
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """Return the rank of a projection; patterns name projections by their last part."""
        return self.rank_pattern.get(module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor of B·A: alpha/r, or alpha/√r with rank-stabilised LoRA."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(module, self.alpha)
        return alpha / rank**0.5 if self.rslora else alpha / rank


RECIPES: dict[str, Recipe] = {
    "chef": Recipe(rank=8, alpha=16),
    "french": Recipe(rank=16, alpha=32),
    "haiku": Recipe(rank=8, alpha=4, rslora=True),
    "legal": Recipe(rank=8, alpha=16, rank_pattern={"down_proj": 16, "k_proj": 4}, alpha_pattern={"q_proj": 24}),
    "pirate": Recipe(rank=12, alpha=20),
    "regex": Recipe(rank=32, alpha=64, modules=("q_proj", "v_proj"), steps=1500),
    "sql": Recipe(rank=8, alpha=16),
    "weather": Recipe(rank=16, alpha=32, modules=FEED_FORWARD),
}
