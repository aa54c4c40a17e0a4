"""What the gradient does on its way back through time: measured, judged, explained and drawn."""

from .diagnosis import Finding, Record, Report
from .history import History
from .monitor import GradientMonitor
from .prescription import Prescription, prescribe

__all__ = ["Finding", "GradientMonitor", "History", "Prescription", "Record", "Report", "prescribe"]
