"""How model weights get from the trainer to vLLM servers: what a transport is (base.py), by files, by NCCL."""
