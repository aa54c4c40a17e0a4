"""What the gradient does on its way back through time: measured, judged, explained and drawn."""

from .diagnosis import Finding, Record, Report
from .history import History
from .monitor import GradientMonitor

__all__ = ["Finding", "GradientMonitor", "History", "Record", "Report"]
