"""FLOPs, accelerators' peaks, and the analysis of compiled programs."""
