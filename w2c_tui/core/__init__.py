"""Conversation, prompts, images, pages, sessions, errors: no torch, no terminal library."""
