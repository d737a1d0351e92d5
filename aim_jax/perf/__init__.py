"""FLOPs, peak rates of accelerators, and analysis of compiled programs."""
