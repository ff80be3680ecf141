"""The report of a simulation: one HTML page that stands alone."""

from sidecar.lab.sim.report.page import page, write_report

__all__ = ["page", "write_report"]
