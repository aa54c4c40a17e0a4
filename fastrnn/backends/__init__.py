"""One thin launcher per backend. Each module has `why_not(request)`, `scan_forward` and `scan_backward`."""
