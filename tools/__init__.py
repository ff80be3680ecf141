"""Scripts for maintainers of the repository. The product does not import them, and no package contains them."""
