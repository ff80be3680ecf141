"""What people read, made of the values that other rooms give: the one place of our sentences."""
