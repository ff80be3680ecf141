"""Scripts for who maintains the repository. Nothing of the product imports them and no package contains them."""
