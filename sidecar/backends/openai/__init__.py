"""What the backends of engines with an OpenAI API share."""
