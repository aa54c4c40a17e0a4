"""What the gradient does on its way back through time: measured, judged, explained and drawn."""

from .diagnosis import Finding, Record, Report
from .doctor import Checkup, Trial, doctor
from .history import History
from .monitor import GradientMonitor
from .prescription import Prescription, prescribe

__all__ = [
    "Checkup", "Finding", "GradientMonitor", "History", "Prescription", "Record", "Report", "Trial", "doctor",
    "prescribe",
]  # fmt: skip
