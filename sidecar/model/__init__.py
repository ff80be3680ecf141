"""What all rooms share: the records and closed sets that the product is about. It imports nothing of ours."""
