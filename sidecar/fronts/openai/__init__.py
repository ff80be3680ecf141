"""The OpenAI API: completions, chats and models, by an adapter's name."""
