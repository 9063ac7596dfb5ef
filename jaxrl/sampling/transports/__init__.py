"""How model weights get from the trainer to vLLM servers: the protocol (base.py), by files, by NCCL."""
