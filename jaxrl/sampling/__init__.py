"""Samplers: in process (local.py), behind one protocol (sampler.py)."""
