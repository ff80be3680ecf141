"""Incidents: capture what is needed to study one elsewhere, and explain a request's wait from its journal."""
