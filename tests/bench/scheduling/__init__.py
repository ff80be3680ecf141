"""What order, placement and admission gain over bare engines, each claim with its goal, in virtual time."""
