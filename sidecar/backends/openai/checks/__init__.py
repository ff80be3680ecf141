"""The checks of a live server of the OpenAI family: one small function each, in files by subject."""
