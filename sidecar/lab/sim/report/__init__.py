"""The report of a simulation: one self-contained HTML page. It needs the extra `lab` (matplotlib)."""

from sidecar.errors import Misused, Reason, needs_extra

try:
    from sidecar.lab.sim.report.page import page, write_report
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "matplotlib":
        raise
    raise Misused(Reason.CONFIG_INVALID, needs_extra("a report or plot", "lab")) from error

__all__ = ["page", "write_report"]
