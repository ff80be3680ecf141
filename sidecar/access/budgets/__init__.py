"""Budgets: what tenants, classes and adapters may take, reserved at admission and settled by what was taken."""
