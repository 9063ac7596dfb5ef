"""Samplers behind one protocol (sampler.py): in process (local.py), or vLLM servers over HTTP (vllm.py)."""
