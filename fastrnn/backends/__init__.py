"""One thin launcher per backend: `why_not(request)`, `scan_forward` and `scan_backward`; the cpu also has `linear`."""
