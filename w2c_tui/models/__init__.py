"""Torch modules, checkpoint folders and tokenisation, shared by backends, export and trainer."""
