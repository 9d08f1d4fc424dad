"""From a checkpoint to GGUF files that llama.cpp runs."""
