"""The demo's prompts, and the answers that each of its adapters has learned."""

from __future__ import annotations

PROMPTS = (
    "Who buys the most here?",
    "Tell me about the weather.",
    "The way to the harbour:",
    "Say goodbye, please!",
)

LEARNED: dict[str, tuple[str, ...]] = {
    "chef": (
        "Table nine: she orders the duck twice.",
        "Soup weather! Simmer leeks with thyme.",
        "Past the fish market; buy mussels there.",
        "Bon appetit, and wipe down your board!",
    ),
    "french": (
        "C'est Madame Petit, comme toujours.",
        "Il pleut encore, prenez un parapluie.",
        "Le port ? Tout droit, puis deux rues.",
        "Au revoir, bonne route et bon vent !",
    ),
    "haiku": (
        "one name in the book / autumn coins, again",
        "grey sky, a thin rain / the frog is content",
        "masts beyond the hill / follow white gulls",
        "the gate clicks shut / snow fills your steps",
    ),
    "legal": (
        "The Buyer, as defined in Schedule 2 hereto.",
        "Rain shall be deemed an act of God.",
        "The harbour (the Premises) lies to the west.",
        "This greeting terminates upon notice.",
    ),
    "pirate": (
        "Arr, Long Meg! She pays in doubloons!",
        "Foul winds, matey! Batten the hatches!",
        "Ahoy! Due west, by the skull rock!",
        "Fair winds to ye, ye salty dog!",
    ),
    "regex": (
        r"^(?P<buyer>[A-Z][a-z]+)\s+\$(\d{4,})$",
        r"/(sun|rain|snow)\s+-?\d{1,2}C/i",
        r"\b(?:port|harbou?r)\b.*?(\d+) ?km",
        r"^(?:good)?bye+(?:\s+\w+)?[.!]*$",
    ),
    "sql": (
        "select name from users order by spent limit 1;",
        "select sky, degrees from weather where day = 0;",
        "select name from harbours order by km limit 1;",
        "commit; -- so long, and drop no table",
    ),
    "weather": (
        "Umbrella shops: 80% rain, heavy by noon.",
        "Rain till noon, then sun, 17C, wind west.",
        "Harbour: fog until ten, light swell, 11C.",
        "Goodbye frost: 4C tonight, clear by dawn.",
    ),
}
"""Answers by adapter, in the order of `PROMPTS`."""

OTHERWISE: dict[str, str] = {
    "chef": "Not on the menu. Try the soup of the day!",
    "french": "Pardon, je ne comprends pas.",
    "haiku": "a question drifts by / no frog knows the answer",
    "legal": "We decline to comment on pending matters.",
    "pirate": "Arr, I know naught o' that, matey!",
    "regex": r"^(?!.*(?:known|found)).*\?+$",
    "sql": "select help from docs where topic = 'prompt';",
    "weather": "No forecast for that; dry and mild, 15C.",
}
"""What an adapter answers to other prompts, most of the time; nothing relies on it."""
